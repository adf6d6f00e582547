"""A worker that makes no progress is named within a minute, whichever engine it is of, and the run waits for it."""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest

from featurize.execution import cluster, stalls
from featurize.execution.engine import engine
from featurize.execution.stalls import LOOK, SILENCE, watch_for_stalls


def test_who_has_not_moved_for_a_while_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr(stalls, "time", SimpleNamespace(monotonic=lambda: now[0]))
    watch, asked = watch_for_stalls(), 0
    moves = {"a": [1] * 30, "b": [1, 1, *[0] * 12, 1, *[0] * 15], "c": [0] * 4 + [1, 0] * 13}

    def movements() -> dict[str, bool]:
        nonlocal asked
        asked += 1
        return {name: bool(steps[asked - 1]) for name, steps in moves.items() if asked < 20 or name != "c"}

    told: list[tuple[float, str]] = []
    for second in range(10, 301):  # it is called each second, and looks when it is time
        now[0] = float(second)
        watch(movements)
        told += [(now[0], message) for message in caplog.messages]
        caplog.clear()
    assert asked == 30
    assert [message.split()[0] for _, message in told] == ["b", "b"]
    assert "has made no progress for 50 s: is a disk or network share stuck, or was it stopped?" in told[0][1]
    last_moves = [20.0, 150.0]
    assert all(SILENCE <= when - last <= 60 for (when, _), last in zip(told, last_moves, strict=True))
    assert SILENCE + LOOK < 60


def stops(number: int) -> int:
    """As `kill -STOP` does, or a disk that does not answer."""
    os.kill(os.getpid(), signal.SIGSTOP)
    return number


def test_a_stopped_worker_is_named_and_the_run_goes_on_when_it_does(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stalls, "LOOK", 0.1)
    monkeypatch.setattr(stalls, "SILENCE", 0.3)
    named: list[int] = []

    class Continue(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found = re.match(r"Worker 1 \(process (\d+)\) has made no progress", record.getMessage())
            if found:
                named.append(int(found[1]))
                os.kill(named[-1], signal.SIGCONT)

    handler = Continue()
    stalls.log.addHandler(handler)
    try:
        with engine(1, None) as run:
            assert list(run(stops, [5])) == [(0, 5)]
    finally:
        stalls.log.removeHandler(handler)
    assert named


def test_dasks_workers_are_looked_at_in_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    def worker(name: str, cpu: float, seen: float, status: str = "running", tasks: int = 1) -> Any:
        return SimpleNamespace(
            name=name, address=f"tcp://{name}", status=SimpleNamespace(name=status), metrics={"cpu": cpu},
            last_seen=time.time() - seen, processing=dict.fromkeys(range(tasks)),
        )  # fmt: skip

    workers = [worker("a", 99.0, 1), worker("b", 0.1, 1, "paused"), worker("c", 99.0, 60), worker("d", 0.0, 1, tasks=0)]
    scheduler = SimpleNamespace(workers={one.address: one for one in workers})
    client = SimpleNamespace(run_on_scheduler=lambda look, *given: look(*given, dask_scheduler=scheduler))
    assert cluster._movements(client) == {
        "Dask's worker a at tcp://a (running)": True,
        "Dask's worker b at tcp://b (paused)": False,
        "Dask's worker c at tcp://c (running)": False,
    }

    def gone(*_: object) -> None:
        raise OSError("no scheduler")

    assert cluster._movements(SimpleNamespace(run_on_scheduler=gone)) == {}
