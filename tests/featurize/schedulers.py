"""Dask schedulers in processes of their own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def address_in(scheduler_file: Path, ended: Callable[[], int | None]) -> str:
    """The address that a scheduler writes to its file, once it is there as a whole. `ended` is its exit code, if it has one."""
    while ended() is None:
        with suppress(FileNotFoundError, json.JSONDecodeError):
            return str(json.loads(scheduler_file.read_text())["address"])
        time.sleep(0.02)
    raise AssertionError(f"the scheduler of {scheduler_file} ended before it wrote its address")
