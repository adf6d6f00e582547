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
from pathlib import Path

import psutil

from featurize.errors import UserError
from featurize.io.files import is_local

log = logging.getLogger(__name__)

POLL = 1.0  # seconds between two tries while waiting
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}  # from a file system that has none


@contextmanager
def root_lock(root: Path, wait: bool) -> Iterator[None]:
    """Hold the store root while the block runs.

    On a disk the kernel keeps the lock and drops it when its process dies, however it dies. A file system without locks (some
    NFS) is used without, after a warning. A bucket has none either: there an object is made that must not be there yet, and
    one left by a dead process of this host is taken over. Raises UserError when another run holds the root and `wait` is false.
    """
    path = root / ".lock"
    waited = False
    while (release := _lock_file(path) if is_local(root) else _mark(path)) is None:
        if not wait:
            raise UserError(
                f"{root} is {_holder(path)}; let it end, or give --wait to go on after it. {_if_dead(path)}"
            )
        if not waited:
            log.info("%s is %s; waiting for it to end.", root, _holder(path))
        waited = True
        time.sleep(POLL)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        release()


def holder(root: Path) -> str | None:
    """Who holds a store root, in words; None when nobody does."""
    path = root / ".lock"
    if not path.exists():
        return None
    if not is_local(root):
        return None if _is_dead(path) else _holder(path)
    with path.open() as file:  # a shared lock needs no right to write, and filelock has none
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _holder(path)
        except OSError:  # a file system without locks
            return None
    return None


def _lock_file(path: Path) -> Callable[[], None] | None:
    """What releases the lock, of which the file says who holds it; None when another process has it."""
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning("The file system of %s has no locks; start no second run on it.", path.parent)
        return lambda: None
    path.write_bytes(_myself())
    return lock.release


def _mark(path: Path) -> Callable[[], None] | None:
    """What releases the lock, where the object could be made; None when it is another run's."""
    if path.exists() and _is_dead(path):
        log.info("%s was %s, which has ended; taken over.", path.parent, _holder(path))
        path.unlink(missing_ok=True)
    try:
        path.fs.pipe_file(path.path, _myself(), mode="create")  # type: ignore[attr-defined]
    except FileExistsError:
        return None
    return lambda: None


def _myself() -> bytes:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    me = {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "command": " ".join(sys.argv)[:500]}
    return json.dumps(me | {"started": psutil.Process().create_time()}).encode()


def _read(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _holder(path: Path) -> str:
    found = _read(path)
    if not found:
        return "held by another run"
    return f"held by process {found.get('pid')} on {found.get('host')} since {found.get('since')}"


def _is_dead(path: Path) -> bool:
    found = _read(path)
    if found.get("host") != socket.gethostname():
        return False
    try:
        process = psutil.Process(int(str(found.get("pid"))))
        return abs(process.create_time() - float(str(found.get("started")))) > 2
    except (psutil.NoSuchProcess, ValueError):
        return True


def _if_dead(path: Path) -> str:
    return "" if is_local(path) else f"If that run has died on its machine, remove {path}."
