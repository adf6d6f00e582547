"""What a training's log tells."""

from __future__ import annotations

from pathlib import Path

import pytest

from nestgen.runs.loss_log import append, training_seconds


def test_the_seconds_of_a_training_are_those_of_all_its_starts(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert training_seconds(log, 64) == 0
    for step, rate in ((10, 64.0), (20, 128.0)):
        append(log, {"step": step, "samples_per_second": rate})
    assert training_seconds(log, 64) == pytest.approx(10 + 5)
