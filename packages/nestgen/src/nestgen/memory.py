"""What a process does with memory that is freed."""

from __future__ import annotations

import ctypes
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
KEPT = 2**31 - 1  # bytes of free memory at the end of the heap


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed, for the next layer, which needs as much.

    By default it gives large blocks back, and the kernel has to find and zero their pages anew for every layer's output:
    of nano's z_0 in batches of 64 that is a third of the time. It holds for the whole process, so that commands call it
    and the Python interface does not.
    """
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, KEPT)
        mallopt(M_MMAP_MAX, 0)
