"""One run at a time on a store root: the second one hears who holds it, and leaves or waits."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import psutil

from featurize.errors import UserError
from featurize.io.files import is_local

log = logging.getLogger(__name__)

POLL = 1.0  # seconds between two looks while waiting


@contextmanager
def root_lock(root: Path, wait: bool) -> Iterator[None]:
    """Hold the store root while the block runs.

    On a disk the kernel keeps the lock and drops it when its process dies, however it dies. A bucket has no such thing: there
    an object is made that must not be there yet, and one left by a process of this host that is no more is taken over.
    Raises UserError when another run holds the root and `wait` is false.
    """
    path = root / ".lock"
    told = False
    while not (held := _flock(path) if is_local(root) else _mark(path)):
        if not wait:
            raise UserError(
                f"{root} is {_holder(path)}; let it end, or give --wait to go on after it. {_if_dead(path)}"
            )
        if not told:
            log.info("%s is %s; waiting for it to end.", root, _holder(path))
        told = True
        time.sleep(POLL)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        if is_local(root):
            os.close(held)


def holder(root: Path) -> str | None:
    """Who holds a store root, in words; None when nobody does."""
    path = root / ".lock"
    if not path.exists():
        return None
    if not is_local(root):
        return None if _is_dead(path) else _holder(path)
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return _holder(path)
    return None


def _flock(path: Path) -> int:
    """An open, locked descriptor of the lock file, or 0 when another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return 0
        # The one who held it before may have removed the very file that is locked here; then another file counts.
        if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
            os.truncate(descriptor, 0)
            os.write(descriptor, _myself())
            return descriptor
        os.close(descriptor)


def _mark(path: Path) -> int:
    """1 when the object is made, 0 when it is another run's."""
    if path.exists() and _is_dead(path):
        log.info("%s was %s, which is no more; taken over.", path.parent, _holder(path))
        path.unlink(missing_ok=True)
    try:
        path.fs.pipe_file(path.path, _myself(), mode="create")  # type: ignore[attr-defined]
    except FileExistsError:
        return 0
    return 1


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
    return "" if is_local(path) else f"Should that run have died on its machine, remove {path}."
