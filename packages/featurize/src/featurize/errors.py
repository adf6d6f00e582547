"""The one exception a user sees, and Ctrl-C."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class UserError(Exception):
    """Bad input or a bad state of the machine, in one sentence: what, where and how to fix it.

    It is put on one line: a name that it quotes may hold line breaks.
    """

    def __init__(self, sentence: object) -> None:
        super().__init__(" ".join(str(sentence).splitlines()))


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the tasks under way are finished: says what is written."""


@contextmanager
def noticing_interrupts() -> Iterator[list[int]]:
    """Ctrl-C raises KeyboardInterrupt as always, and is noted in the list that the block gets.

    Libraries make other errors of it: Python 3.11 does while a class is being made, safetensors while it reads weights.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # somebody else decides
        yield came
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def explain_os_error(error: OSError) -> UserError | None:
    """The sentence for a failed write or read that the user can fix; None for any other error."""
    import errno
    import os

    where = f" at {error.filename}" if error.filename else ""
    sentences = {
        errno.ENOSPC: f"No space is left on the disk{where}; free some and run the same command again, it goes on.",
        errno.EDQUOT: f"The disk quota is used up{where}; free some space and run the same command again.",
        errno.EFBIG: f"The file system refuses a file so large{where}; use another one and run the same command again.",
        errno.ENOTDIR: f"A folder of this path is a file{where}; choose another --out.",
        errno.ENAMETOOLONG: f"A name in this path is too long{where}; choose a shorter one.",
        errno.EROFS: f"The file system is read-only{where}; make it writable or choose another --out.",
        errno.EACCES: f"Permission is denied{where}; fix the permissions or choose another --out.",
        errno.EPERM: f"Permission is denied{where}; fix the permissions or choose another --out.",
    } | {
        number: f"The disk or network share fails{where} ({os.strerror(number)}); bring it back and run the same command "
        "again, it goes on."
        for number in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN)
    }
    sentence = sentences.get(error.errno) if error.errno is not None else None
    return UserError(sentence) if sentence else None


def explain_memory_error(error: BaseException) -> UserError | None:
    """The sentence for memory that ran out, of this machine or of a GPU; None for any other error."""
    gpu = type(error).__name__ == "OutOfMemoryError"  # torch's, which may not be imported
    if not (gpu or isinstance(error, MemoryError) or re.search("DefaultCPUAllocator|alloc_cpu", str(error))):
        return None
    return UserError(
        f"The memory of the {'GPU' if gpu else 'machine'} is full; give fewer --workers, or choose a smaller image or network."
    )
