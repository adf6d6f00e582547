"""Whether processes end with the one that started them."""

from __future__ import annotations

import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil


def left_once_killed(process: BaseProcess, folder: Path) -> list[int]:
    """Waits for the file `pids` that the process writes into the folder, and kills it; which of those are there after 30 s."""
    while not (folder / "pids").exists():
        assert process.exitcode is None
        time.sleep(0.02)
    process.kill()
    pids = [int(pid) for pid in (folder / "pids").read_text().split()]
    deadline = time.monotonic() + 30
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:  # also one that sleeps
        time.sleep(0.02)
    return [pid for pid in pids if psutil.pid_exists(pid)]
