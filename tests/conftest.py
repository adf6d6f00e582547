"""Fixtures that every test may use."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.context
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The machine may be busy: how long an example takes says nothing.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real pictures, or a visible skip where it is absent."""
    folder = Path(os.environ.get("NESTED_TEST_DATA", Path(__file__).parents[1] / ".." / "shared" / "data")).resolve()
    if not (folder / "README.md").is_file():
        pytest.skip(f"real test data is not at {folder}; set NESTED_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of an S3 server in this process; the AWS variables of the environment lead every client to it."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str) -> str:
    """A fresh bucket of the S3 server, like `s3://test-1a2b`."""
    import fsspec

    name = f"test-{uuid.uuid4().hex[:8]}"
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(name)
    return f"s3://{name}"


IMPORTED = [
    "featurize.extraction.extract",
    "timm",
    "distributed",
    "nestgen.training.train",
    "nestgen.sampling.sample",
    "matplotlib.figure",
]
ForkServer = multiprocessing.context.ForkServerContext
# A process that starts looks at all others for their ends. Of two threads that look at one at once the second gets 255.
LOOKING = threading.Lock()
# The server was perhaps begun by a test of featurize's workers, which are to get no signals.
GET_SIGNALS = "import signal; signal.pthread_sigmask(signal.SIG_SETMASK, [])\n"


@pytest.fixture(scope="session")
def fork_server() -> ForkServer:
    """Starts processes that have both packages imported already, so that they cost no seconds; Dask's workers as well."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


@pytest.fixture
def fork(fork_server: ForkServer) -> Iterator[Callable[..., BaseProcess]]:
    """Runs Python code in a process of its own. All are killed at the end.

    The code sees the keywords as variables; `environment` is added to its environment.
    """
    started: list[BaseProcess] = []

    def run(code: str, environment: dict[str, str] | None = None, **variables: object) -> BaseProcess:
        code = f"import os, torch; os.environ.update(environment); torch.set_num_threads(1)\n{code}"
        variables |= {"environment": {**os.environ, **(environment or {})}}
        process = fork_server.Process(target=exec, args=(GET_SIGNALS + code, variables))
        with LOOKING:
            process.start()
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.join(60)


COMMAND = """
import importlib, os, sys
os.environ.update(environment)
os.chdir(folder)
for number, path in enumerate((out, errors), start=1):
    os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
sys.argv = arguments
exec(before)
importlib.import_module(f"{arguments[0]}.__main__").main()  # what the command `featurize` or `nestgen` calls
"""


@dataclass(frozen=True)
class Begun:
    """A command under way, and the files of what it prints."""

    process: BaseProcess
    out: Path
    errors: Path

    def ended(self) -> tuple[int, str, str]:
        """Waits for its end: (exit code, output, errors)."""
        wait([self.process.sentinel])
        with LOOKING:
            self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode, self.out.read_text(), self.errors.read_text()


Begin = Callable[..., Begun]


@pytest.fixture(scope="session")
def begin(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Begin:
    """Begins a command in a process of its own: `begin(folder, "nestgen", "train", ...)`, called in that folder.

    `before` is Python code that the process runs first.
    """

    def call(folder: Path, *arguments: object, before: str = "") -> Begun:
        printed = tmp_path_factory.mktemp("printed")
        variables = {
            "environment": os.environ | {"OMP_NUM_THREADS": "1"},
            "folder": folder,
            "out": printed / "out",
            "errors": printed / "errors",
            "arguments": [*map(str, arguments)],
            "before": before,
        }
        process = fork_server.Process(target=exec, args=(GET_SIGNALS + COMMAND, variables))
        with LOOKING:
            process.start()
        return Begun(process, printed / "out", printed / "errors")

    return call
