"""Lets a workflow that was killed be started again: Snakemake's own lock of the folder outlives the process that made it."""

from __future__ import annotations

import fcntl
from io import TextIOWrapper
from pathlib import Path

_held: dict[Path, TextIOWrapper] = {}


def forget_locks_of_the_dead(folder: Path) -> bool:
    """Remove Snakemake's locks of a folder where no workflow is alive; False where one is.

    Whoever works in a folder holds a lock that the system takes back when the process ends, however it ends. A second
    workflow does not get it, leaves everything as it is, and Snakemake refuses it as ever.
    """
    notes = folder.resolve() / ".snakemake"
    notes.mkdir(exist_ok=True)
    alive = _held.get(notes) or (notes / "alive").open("w")
    try:
        fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another holds it, or this file system has no locks
        alive.close()
        return False
    _held[notes] = alive  # until this process ends
    for lock in notes.glob("locks/*.lock"):
        lock.unlink(missing_ok=True)
    return True
