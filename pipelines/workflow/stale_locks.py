"""Lets a killed workflow be started again: Snakemake's own lock of the folder outlives the process that made it."""

from __future__ import annotations

import fcntl
from io import TextIOWrapper
from pathlib import Path

_own_locks: dict[Path, TextIOWrapper] = {}  # open until this process ends


def remove_stale_locks(folder: Path) -> bool:
    """Remove Snakemake's locks of a folder where no workflow is running; False where one is.

    Every workflow holds a file lock that the system releases when its process ends, however it ends. A second workflow
    can't take it, changes nothing, and Snakemake then refuses it as usual.
    """
    state = folder.resolve() / ".snakemake"
    state.mkdir(exist_ok=True)
    lock = _own_locks.get(state) or (state / "alive").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process holds it, or this file system has no locks
        lock.close()
        return False
    _own_locks[state] = lock
    for stale in state.glob("locks/*.lock"):
        stale.unlink(missing_ok=True)
    return True
