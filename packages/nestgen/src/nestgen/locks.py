"""Locks that the system takes back however a process ends: of a folder, and of parts of the work in it."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from nestgen.errors import UserError
from nestgen.files import writing

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}  # from a file system that has none


@contextmanager
def folder_lock(folder: Path, use: str) -> Iterator[None]:
    """Holds the lock of a folder, FOLDER/.lock; the system releases it however the process ends.

    Raises UserError if another process holds it; `use` says what that one does there, such as "is being trained". Prints a
    warning where the file system has no locks.
    """
    with _lock_file(folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder} {use} by another process ({_owner(file)}); wait for it, or stop it with Ctrl-C"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(f"warning: the file system of {folder} has no locks; start no second command on it", file=sys.stderr)
        _sign(file, folder)
        yield


@dataclass(frozen=True)
class PartLocks:
    """Locks of numbered parts of the work in a folder, shared out among processes on one machine or several.

    Part n is byte n of FOLDER/.lock under a POSIX record lock. A file system that several machines mount (NFS, Lustre,
    GPFS, CephFS) keeps such locks for all of them, and takes them back when a process or, after a while, a machine ends.
    They are the process's: it must open the file once only, as closing it anywhere releases all of them.
    """

    folder: Path
    file: BinaryIO

    def lock(self, parts: range, *, shared: bool = False, wait: bool = False) -> bool:
        """Locks parts, against all or against those who do not share; whether they are locked now.

        A lock of the same parts by this process is replaced. Raises UserError where the file system has no locks.
        """
        how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.lockf(self.file, how, len(parts), parts.start)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise UserError(
                f"the file system of {self.folder} has no locks ({error.strerror}), which keep two processes from the same "
                "work; name a folder of another one, or mount it with locks"
            ) from None
        return True

    def unlock(self, parts: range) -> None:
        """Releases parts."""
        fcntl.lockf(self.file, fcntl.LOCK_UN, len(parts), parts.start)

    @contextmanager
    def held(self, parts: range, *, wait: bool = False) -> Iterator[bool]:
        """Holds parts within a block, if they are free or once they are (`wait`); gives whether it does."""
        locked = self.lock(parts, wait=wait)
        try:
            yield locked
        finally:
            if locked:
                self.unlock(parts)

    def sign(self) -> None:
        """Writes into the file who uses the folder, for `user`."""
        _sign(self.file, self.folder)

    def user(self) -> str:
        """The process that signed last, `process 12 on host`."""
        return _owner(self.file)


def open_locks(folder: Path) -> PartLocks:
    """The locks of a folder's parts, none of them held; all are released once its `file` is closed."""
    return PartLocks(folder, _lock_file(folder))


def _lock_file(folder: Path) -> BinaryIO:
    with writing(folder / ".lock"):
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / ".lock").open("a+b", buffering=0)


def _owner(file: BinaryIO) -> str:
    return os.pread(file.fileno(), 1000, 0).decode(errors="replace").strip()


def _sign(file: BinaryIO, folder: Path) -> None:
    with writing(folder / ".lock"):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
