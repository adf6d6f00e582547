"""Whatever is killed, and whenever: the finished store has the bytes of one that nothing happened to."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
from PIL import Image

from featurize.execution import stalls
from featurize.extraction import targets
from featurize.extraction.extract import extract
from featurize.recipe import Request, read_request
from tests.conftest import Begin
from tests.featurize.conftest import chunks, options, random_picture
from tests.featurize.schedulers import address_in

LEVELS = "2x2x8,1x1x4"
WORKER_KILLS = 5
ROWS_PER_BLOCK = 16


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 pictures of 16 pixels: 15 blocks."""
    folder = tmp_path_factory.mktemp("many") / "pictures"
    folder.mkdir()
    for index in range(240):
        random_picture(index, 16, 16).save(folder / f"{index:03d}.png")
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, pictures: Path, vit_weights: Path) -> dict[str, bytes]:
    """Chunks and seals of a run that nothing happens to, in one process."""
    root = tmp_path_factory.mktemp("undisturbed") / "root"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "MAX_ROWS_PER_BLOCK", ROWS_PER_BLOCK)
        extract(request_for(pictures, vit_weights, root), workers=0, scheduler=None)
    return chunks(root)


def request_for(pictures: Path, weights: Path, root: Path) -> Request:
    return read_request(None, options(pictures, weights, root, basis_rows=200), LEVELS)


def _killed_by_chance(request: Request, seed: int) -> None:
    """Extract, and die at a random call that makes something lasting: before it, or after it."""
    chance = random.Random(seed)

    def dangerous(call: Callable) -> Callable:
        def wrapped(*arguments: object, **named: object) -> object:
            fate = chance.random()
            if fate < 0.01:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*arguments, **named)
            if fate > 0.99:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    for module, name in ((os, "replace"), (os, "fsync"), (os, "unlink"), (Path, "replace"), (Path, "mkdir")):
        setattr(module, name, dangerous(getattr(module, name)))
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    extract(request, workers=0, scheduler=None)


def test_twenty_kills_leave_no_trace(
    pictures: Path, vit_weights: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "MAX_ROWS_PER_BLOCK", ROWS_PER_BLOCK)
    root = tmp_path / "root"
    request = request_for(pictures, vit_weights, root)

    # Workers first, while the main process goes on; then the main process of that run.
    command = [
        sys.executable,
        "-c",
        f"from featurize.extraction import targets; targets.MAX_ROWS_PER_BLOCK = {ROWS_PER_BLOCK}; "
        "from featurize.cli.main import main; main()",
        *(
            "extract",
            str(request.features.source),
            "--encoder",
            request.features.encoder,
            "--weights",
            str(vit_weights),
        ),
        *("--out", str(root), "--views", "2", "--z0", "pixels:16", "--basis-rows", "200", "--levels", LEVELS),
        *("--workers", "2"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    killed = 0
    deadline = time.monotonic() + 300
    while not (root / "first-pass").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    while killed < WORKER_KILLS and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
        workers = [child for child in psutil.Process(process.pid).children(recursive=True) if _is_worker(child)]
        if workers:
            random.Random(killed).choice(workers).kill()
            killed += 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed += 1
    assert killed == WORKER_KILLS + 1, "the run ended before its workers could be killed"

    fork = multiprocessing.get_context("fork")
    for seed in range(200):
        child = fork.Process(target=_killed_by_chance, args=(request, seed))
        child.start()
        child.join(120)
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        killed += 1
    assert killed >= 20
    extract(request, workers=0, scheduler=None)
    # One that was killed after its last seal left half-written files, that only a run with work to do removes.
    assert {name: of for name, of in chunks(root).items() if not name.endswith((".partial", ".tmp"))} == undisturbed

    # A run that was killed between its last seal and its end left nothing to do but to tidy up: the next that works does it.
    other = request.features.model_copy(update={"z0": "pixels:8"})
    extract(request.model_copy(update={"features": other}), workers=0, scheduler=None)
    leftovers = [path for path in root.rglob("*") if path.suffix in (".tmp", ".partial", ".blocks", ".parts")]
    assert not leftovers
    events = [json.loads(line)["event"] for line in (root / "extract.log.jsonl").read_text().splitlines()]
    assert events[-1] == "end"


def _is_worker(process: psutil.Process) -> bool:
    """Whether it was forked by the server that the main process's workers come from."""
    try:
        return "forkserver" in " ".join(process.parent().cmdline())
    except (psutil.Error, AttributeError):
        return False


@pytest.mark.parametrize(
    ("sent", "workers"),
    [(signal.SIGINT, 0), (signal.SIGTERM, 1), (signal.SIGKILL, 0)],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_run_with_decoders_that_is_stopped_leaves_no_process_and_goes_on(
    sent: signal.Signals,
    workers: int,
    pictures: Path,
    vit_weights: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    begin: Begin,
) -> None:
    """Ctrl-C goes to all processes of a terminal, decoders among them; SIGTERM and `kill -9` to the main one."""
    monkeypatch.setattr(targets, "MAX_ROWS_PER_BLOCK", ROWS_PER_BLOCK)
    root = tmp_path / "root"
    request = options(pictures, vit_weights, root)
    words = [word for name in ("encoder", "weights", "out", "views", "z0") for word in (f"--{name}", request[name])]
    begun = begin(
        tmp_path,
        *("featurize", "extract", request["source"], *words, "--basis-rows", 200, "--levels", LEVELS),
        *("--workers", workers, "--decoders", 2),
        before=f"from featurize.extraction import targets; targets.MAX_ROWS_PER_BLOCK = {ROWS_PER_BLOCK}",
    )
    while not list(root.glob("first-pass/*/base.blocks/*[0-9].json")):
        assert begun.process.is_alive(), begun.errors.read_text()
        time.sleep(0.002)
    main = psutil.Process(begun.process.pid)
    others = main.children(recursive=True)
    for process in (main, *(others if sent == signal.SIGINT else ())):
        process.send_signal(sent)
    assert len(others) >= workers + 2
    code, _, errors = begun.ended()
    assert "Traceback" not in errors
    if sent == signal.SIGKILL:
        assert code == -sent
    else:
        assert code == 130, "it ended before it could be stopped"
        assert "stopping: the tasks under way are finished first" in errors and "are kept in" in errors
    assert not psutil.wait_procs(others, timeout=60)[1]
    extract(request_for(pictures, vit_weights, root), workers=0, scheduler=None)
    assert chunks(root) == undisturbed


@pytest.mark.parametrize("workers", [1, 4])
def test_any_number_of_workers_gives_the_same_bytes(
    workers: int,
    pictures: Path,
    vit_weights: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(targets, "MAX_ROWS_PER_BLOCK", ROWS_PER_BLOCK)
    extract(request_for(pictures, vit_weights, tmp_path / "root"), workers=workers, scheduler=None)
    assert chunks(tmp_path / "root") == undisturbed


def test_another_block_size_gives_the_same_values(
    pictures: Path, vit_weights: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """Blocks decide where values lie, not what they are: chunk after chunk the bytes of all rows are the same."""
    extract(request_for(pictures, vit_weights, tmp_path / "root"), workers=0, scheduler=None)
    larger = chunks(tmp_path / "root")

    def rows(found: dict[str, bytes], array: str) -> bytes:
        blocks = sorted(
            (int(name.split("/c/")[1].split("/")[0]), data) for name, data in found.items() if f"{array}/c/" in name
        )
        return b"".join(data for _, data in blocks)[: 240 * 2 * 16 * 16 * 3 * 2 if "16x16" in array else None]

    assert rows(larger, "16x16x3.zarr") == rows(undisturbed, "16x16x3.zarr")


DASK = "from distributed.cli.dask_{0} import main; main(options)".format


def begin_scheduler(fork: Callable[..., BaseProcess], folder: Path) -> tuple[BaseProcess, str]:
    """A Dask scheduler in a process of its own, and its address."""
    file = folder / "scheduler.json"
    where = ["--port=0", "--dashboard-address=:0", "--host=127.0.0.1", f"--scheduler-file={file}"]
    scheduler = fork(DASK("scheduler"), options=where)
    return scheduler, address_in(file, lambda: scheduler.exitcode)


def test_a_cluster_of_processes_survives_the_loss_of_one(
    pictures: Path,
    vit_weights: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fork: Callable[..., BaseProcess],
) -> None:
    """A scheduler and three workers, each a process of its own; one worker is killed midway."""
    monkeypatch.setattr(targets, "MAX_ROWS_PER_BLOCK", ROWS_PER_BLOCK)
    monkeypatch.setattr(stalls, "LOOK", 0.5)  # the scheduler is asked how they move, over and over
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "root"
    _, place = begin_scheduler(fork, tmp_path)
    workers = [fork(DASK("worker"), options=["--nthreads=1", "--no-nanny", "--no-dashboard", place]) for _ in range(3)]
    ended = threading.Event()

    def kill_midway() -> None:
        while not list(root.glob("first-pass/*/base.blocks/*[0-9].json")):
            if ended.wait(0.01):
                return
        workers[0].kill()

    killer = threading.Thread(target=kill_midway)
    killer.start()
    try:
        extract(request_for(pictures, vit_weights, root), workers=None, scheduler=place)
    finally:
        ended.set()
        killer.join()
    assert workers[0].exitcode == -signal.SIGKILL, "the worker was not killed before the run ended"
    assert chunks(root) == undisturbed


def test_a_scheduler_that_dies_is_one_sentence(
    pictures: Path, vit_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fork: Callable[..., BaseProcess]
) -> None:
    from featurize.errors import UserError

    monkeypatch.setattr(targets, "MAX_ROWS_PER_BLOCK", ROWS_PER_BLOCK)
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "root"
    scheduler, place = begin_scheduler(fork, tmp_path)
    fork(DASK("worker"), options=["--nthreads=1", "--no-nanny", "--no-dashboard", "--death-timeout=5", place])
    ended = threading.Event()

    def kill_midway() -> None:
        while not list(root.glob("first-pass/*/base.blocks/*[0-9].json")):
            if ended.wait(0.01):
                return
        scheduler.kill()

    killer = threading.Thread(target=kill_midway)
    killer.start()
    try:
        with pytest.raises(
            UserError, match=r"scheduler at tcp://.* died or can't be reached any more; what is done is kept"
        ):
            extract(request_for(pictures, vit_weights, root), workers=None, scheduler=place)
    finally:
        ended.set()
        killer.join()


def test_a_read_only_store_is_one_sentence_and_the_run_goes_on(
    pictures: Path, vit_weights: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk turns read-only under a run: what `os.replace` and the rest then say is put in one sentence."""
    from featurize.errors import UserError

    monkeypatch.setattr(targets, "MAX_ROWS_PER_BLOCK", ROWS_PER_BLOCK)
    request = request_for(pictures, vit_weights, tmp_path / "root")
    replace, count = os.replace, iter(range(1000))

    def read_only(source: str, target: str) -> None:
        if next(count) > 80:
            raise OSError(30, "Read-only file system", str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", read_only)
        with pytest.raises(UserError, match="read-only"):
            extract(request, workers=0, scheduler=None)
    extract(request, workers=0, scheduler=None)
    assert chunks(tmp_path / "root") == undisturbed


def test_pictures_of_one_colour_are_allowed(tmp_path: Path, vit_weights: Path) -> None:
    """They are constant in pixels, which is no damage."""
    from featurize.execution.tasks import run_here
    from featurize.integrity.verify import verify

    (tmp_path / "pictures").mkdir()
    for index in range(4):
        Image.new("RGB", (16, 16), (index * 50, 20, 90)).save(tmp_path / "pictures" / f"{index}.png")
    extract(request_for(tmp_path / "pictures", vit_weights, tmp_path / "root"), workers=0, scheduler=None)
    assert verify(tmp_path / "root", run_here) == []
