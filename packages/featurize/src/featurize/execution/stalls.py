"""Workers that make no progress are named: a stuck disk, or a process that somebody stopped, says nothing by itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

log = logging.getLogger(__name__)

LOOK = 10.0  # seconds between two looks
SILENCE = 45.0  # seconds without progress after which a worker is named: within a minute of its last sign
LEAST = 0.005  # share of a core: who uses less is not moving. A worker that waits for its GPU polls, which takes a core


def watch_for_stalls() -> Callable[[Callable[[], Mapping[str, bool]]], None]:
    """What an engine calls as often as it likes, with what tells of each worker that has a task whether it has moved since it was
    last called. That is called every LOOK seconds. A worker that hasn't moved for SILENCE seconds is named, once."""
    looked = time.monotonic()
    moved_at: dict[str, float] = {}
    named: set[str] = set()

    def watch(movements: Callable[[], Mapping[str, bool]]) -> None:
        nonlocal looked
        now = time.monotonic()
        if now - looked < LOOK:
            return
        looked, moved = now, movements()
        for worker in moved_at.keys() - moved.keys():
            del moved_at[worker]
        for worker, has_moved in moved.items():
            if has_moved or worker not in moved_at:
                moved_at[worker] = now
                named.discard(worker)
            elif now - moved_at[worker] >= SILENCE and worker not in named:
                named.add(worker)
                log.warning(
                    "%s has made no progress for %.0f s: is a disk or network share stuck, or was it stopped? The run waits for "
                    "it; end that process, and another one does its block.", worker, now - moved_at[worker],
                )  # fmt: skip

    return watch
