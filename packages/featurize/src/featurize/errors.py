"""The one exception a user sees."""

from __future__ import annotations


class UserError(Exception):
    """Bad input or a bad state of the machine, in one sentence: what, where and how to fix it."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the tasks under way are finished: says what is written."""


def interrupt_of(error: BaseException) -> KeyboardInterrupt | None:
    """The Ctrl-C behind an error; None where there is none.

    Where it comes while a class is being made, Python raises RuntimeError from it, and click makes Abort of it.
    """
    link: BaseException | None = error
    while link is not None and not isinstance(link, KeyboardInterrupt):
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return link


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
    if not (gpu or isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)):
        return None
    return UserError(
        f"The memory of the {'GPU' if gpu else 'machine'} is full; give fewer --workers (each encodes 32 images at a time), or "
        "choose a smaller image or network."
    )
