"""No other user of the machine or the network can send work: local processes listen nowhere, a cluster wants a certificate."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.featurize.conftest import MODEL, chunks, options
from tests.featurize.schedulers import address_in

FEATURIZE = (sys.executable, "-c", "from featurize.cli.main import main; main()")


def listeners_until_it_ends(command: list[object]) -> tuple[set[tuple[str, int]], int]:
    """The addresses at which a command or one of its processes ever listened, and how many processes it had."""
    found: set[tuple[str, int]] = set()
    most = 0
    with subprocess.Popen(
        [*FEATURIZE, *map(str, command)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as main:
        while main.poll() is None:
            try:
                processes = [psutil.Process(main.pid), *psutil.Process(main.pid).children(recursive=True)]
                most = max(most, len(processes))
                for process in processes:
                    found |= {tuple(c.laddr) for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
            except psutil.Error:  # one has just ended
                continue
            time.sleep(0.02)
    assert main.returncode == 0
    return found, most


def extraction_words(pictures: Path, weights: Path, root: Path) -> list[object]:
    request = options(pictures, weights, root)
    words = ["extract", request["source"], "--encoder", request["encoder"], "--weights", weights, "--out", root]
    return [*words, "--views", 2, "--z0", "pixels:16", "--levels", "2x2x8,1x1x16"]


def test_local_work_listens_nowhere(extraction: Path, picture_folder: Path, vit_weights: Path, tmp_path: Path) -> None:
    words = extraction_words(picture_folder, vit_weights, tmp_path / "root")
    found, processes = listeners_until_it_ends([*words, "--workers", 2])
    assert found == set()
    assert processes >= 3
    words = ["knn-viz", "--stores", extraction, "--encoder", f"timm:{MODEL}", "--out", tmp_path / "knn.png"]
    found, processes = listeners_until_it_ends([*words, "--queries", 1])
    assert found == set()
    assert processes >= 2


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A folder of Dask's configuration as docs/cluster.md makes it."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path / "dask"
    folder.mkdir()
    made = "openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj /CN=dask -keyout dask.key -out dask.crt"
    subprocess.run(made.split(), cwd=folder, check=True, capture_output=True)
    pair = {"cert": str(folder / "dask.crt"), "key": str(folder / "dask.key")}
    tls = {"ca-file": str(folder / "dask.crt"), "scheduler": pair, "worker": pair, "client": pair}
    document = {"distributed": {"comm": {"require-encryption": True, "tls": tls}}}
    (folder / "tls.yaml").write_text(json.dumps(document))  # JSON is YAML
    return folder


@pytest.fixture
def start(certificate: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a command of Dask that reads this configuration."""
    started: list[subprocess.Popen] = []

    def run(command: str, *words: object) -> subprocess.Popen:
        line = [sys.executable, "-m", f"distributed.cli.dask_{command}", *map(str, words)]
        started.append(subprocess.Popen(line, env=environment(certificate), cwd=certificate, stderr=subprocess.DEVNULL))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "DASK_CONFIG": str(folder), "OMP_NUM_THREADS": "1"}


def test_a_cluster_with_certificates_takes_work_from_their_owner_alone(
    certificate: Path,
    start: Callable,
    extraction: Path,
    picture_folder: Path,
    vit_weights: Path,
    tmp_path: Path,
) -> None:
    place = tmp_path / "scheduler.json"
    scheduler = start(
        "scheduler",
        "--protocol",
        "tls",
        "--host",
        "127.0.0.1",
        "--port",
        0,
        "--no-dashboard",
        "--scheduler-file",
        place,
    )
    address = address_in(place, scheduler.poll)
    start("worker", "--scheduler-file", place, "--nthreads", 1, "--no-nanny", "--no-dashboard")
    assert address.startswith("tls://127.0.0.1:")
    words = [*FEATURIZE, *map(str, extraction_words(picture_folder, vit_weights, tmp_path / "root"))]
    plain = address.replace("tls", "tcp")
    for stranger, why in (
        (address, f"{address} wants a certificate"),
        (plain, f"No Dask scheduler answers at {plain}"),
    ):
        refused = subprocess.run([*words, "--scheduler", stranger], capture_output=True, text=True)
        assert refused.returncode == 1
        assert refused.stderr.splitlines()[-1].startswith(f"error: {why}"), refused.stderr
    done = subprocess.run(
        [*words, "--scheduler", address], env=environment(certificate), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert chunks(tmp_path / "root") == chunks(extraction)
