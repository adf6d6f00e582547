"""One run at a time on a store root: the second one hears who holds it, and leaves or waits."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

from featurize.errors import UserError
from featurize.io import bucket_lock
from featurize.io.files import is_local, make_folder, to_disk

log = logging.getLogger(__name__)

POLL = 1.0  # seconds between two tries while waiting
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}  # from a file system that has none


@contextmanager
def root_lock(root: Path, wait: bool) -> Iterator[None]:
    """Hold the store root while the block runs.

    On a disk the kernel keeps the lock and drops it when its process dies, however it dies. A file system without locks (some
    NFS), or one that can't sync folders, is used without, after a warning. For a bucket see `bucket_lock`. Raises UserError when
    another run holds the root and `wait` is false, and at the end where the lock of a bucket was taken from this run.
    """
    path = root / ".lock"
    waited = False
    while (release := _lock_file(path) if is_local(root) else bucket_lock.acquire(path, _myself())) is None:
        if not wait:
            raise UserError(f"{root} is {_holder(path)}; let it end, or give --wait to go on after it.{_if_old(path)}")
        if not waited:
            log.info("%s is %s; waiting for it to end.", root, _holder(path))
        waited = True
        time.sleep(POLL)
    if is_local(root) and not to_disk(root):
        log.warning(
            "The file system of %s can't sync folders: after a power cut files may be missing. Run the same command again then, "
            "it makes them again; `featurize verify` says what a finished store lacks.", root,
        )  # fmt: skip
    try:
        yield
    finally:
        release()


def holder(root: Path) -> str | None:
    """Who holds a store root, in words; None when nobody does."""
    path = root / ".lock"
    if not path.exists():
        return None
    if not is_local(root):
        return _holder(path)
    with path.open() as file:  # a shared lock, which needs no right to write
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _holder(path)
        except OSError:  # a file system without locks
            return None
    return None


def _lock_file(path: Path) -> Callable[[], None] | None:
    """What releases the lock, of which the file says who holds it; None when another process has it."""
    make_folder(path.parent)
    file = path.open("a+b", buffering=0)  # not emptied: it may name the run that holds the lock
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if isinstance(error, BlockingIOError):
            return None
        if error.errno not in NO_LOCKS:
            raise
        log.warning("The file system of %s has no locks; start no second run on it.", path.parent)
        return lambda: path.unlink(missing_ok=True)
    if not _is_at(path, file):  # its holder removed it after it was opened here
        file.close()
        return _lock_file(path)
    file.truncate(0)
    file.write(json.dumps(_myself()).encode())

    def release() -> None:
        path.unlink(missing_ok=True)
        file.close()

    return release


def _is_at(path: Path, file: FileIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _myself() -> dict[str, Any]:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "command": " ".join(sys.argv)[:500]}


def _holder(path: Path) -> str:
    found = bucket_lock.read_mark(path)
    if not found:
        return "held by another run"
    alive = f" (last sign of life {found['alive']})" if "alive" in found else ""
    return f"held by process {found.get('pid')} on {found.get('host')} since {found.get('since')}{alive}"


def _if_old(path: Path) -> str:
    if is_local(path) or "token" in (bucket_lock.read_mark(path) or {}):
        return ""
    return f" It was started by an earlier version; if it has died, remove {path}."
