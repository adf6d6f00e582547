"""The log of a run, for a program that reads it later."""

from __future__ import annotations

from pathlib import Path

from featurize.execution.progress import Journal, last_request


def test_a_line_cut_off_by_a_power_cut_does_not_take_the_next_with_it(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"event": "start", "request": {"features": {"out": "a"}}}\n{"event": "led\0\0')
    journal = Journal(log)
    journal("start", request={"features": {"out": "b"}})
    journal("ledger", rows=1)
    assert last_request(log) == {"out": "b"}
