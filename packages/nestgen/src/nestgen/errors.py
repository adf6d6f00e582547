"""The one exception a user sees, and Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class UserError(Exception):
    """Bad input. The message is one sentence: what is wrong, where, and how to fix it.

    It is put on one line: a name that it quotes may hold line breaks.
    """

    def __init__(self, sentence: object) -> None:
        super().__init__(" ".join(str(sentence).splitlines()))


class LostProcess(UserError):
    """Another process of the same training ended; what it printed says why."""


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
