"""Ctrl-C (and SIGTERM, as a batch system sends it) lets the blocks under way finish; the second one stops at once."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME = 1.0  # seconds within which several signals are one: SLURM sends them to all processes of a job, and again to this one
_stop = threading.Event()


def stop_requested() -> bool:
    """Whether no further task should be begun."""
    return _stop.is_set()


@contextmanager
def finishing_tasks() -> Iterator[None]:
    """While the block runs, the first signal only sets a mark (`stop_requested`). Nothing changes outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    requested: float | None = None

    def request_stop(number: int, frame: Any) -> None:
        nonlocal requested
        if requested is not None:
            if time.monotonic() - requested > SAME:
                raise KeyboardInterrupt
            return
        requested = time.monotonic()
        _stop.set()
        sys.stderr.write("\nstopping: the tasks under way are finished first; Ctrl-C again stops at once.\n")

    before = {number: signal.signal(number, request_stop) for number in SIGNALS}
    _stop.clear()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _stop.clear()


@contextmanager
def signals_later() -> Iterator[None]:
    """Signals come when the block has ended; to a process that is started in it, never.

    Else Ctrl-C, which a terminal sends to all processes, meets that process while it imports, and it prints a traceback.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
