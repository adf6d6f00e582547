"""Ctrl-C (and SIGTERM, as a batch system sends it) lets the blocks in hand finish; the second one stops at once."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_asked = threading.Event()


def asked_to_stop() -> bool:
    """Whether no further task should be begun."""
    return _asked.is_set()


@contextmanager
def finishing_tasks() -> Iterator[None]:
    """While the block runs, the first signal only asks (`asked_to_stop`). Nothing changes outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: Any) -> None:
        if _asked.is_set():
            raise KeyboardInterrupt
        _asked.set()
        sys.stderr.write("\nstopping: the tasks in hand are finished first; Ctrl-C again stops at once.\n")

    before = {number: signal.signal(number, ask) for number in SIGNALS}
    _asked.clear()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked.clear()


def dask_setup(worker: Any) -> None:
    """Dask calls this in each local worker: a terminal sends Ctrl-C to them too, and only the main process is to heed it.

    Nor are they to write beside the progress line: what goes wrong with a task is the main process's to say.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
