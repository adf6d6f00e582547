"""How far a run is: one line for a person, and a log beside the store for a program."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from featurize.io.files import is_local, naming

KEEP = 50  # events that wait before a log in a bucket is written again


class Journal:
    """The log of a store root: one JSON object a line, each with `time` and `event`; runs follow one another.

    An object in a bucket can't be added to, so there the whole log is written anew from time to time.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[str] = ["\n"] if is_local(path) and _is_cut_off(path) else []
        self._written = 0

    def __call__(self, event: str, **facts: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._lines.append(json.dumps({"time": now, "event": event} | facts) + "\n")
        if is_local(self._path) or len(self._lines) - self._written >= KEEP:
            self.write()

    def write(self) -> None:
        """Write what the log lacks."""
        if is_local(self._path):
            with naming(self._path), self._path.open("a", encoding="utf-8") as file:
                file.writelines(self._lines)
            self._lines.clear()
            return
        if self._lines and self._written == 0 and self._path.exists():
            self._lines = [self._path.read_text(), *self._lines]
        if len(self._lines) > self._written:
            self._path.write_text("".join(self._lines))
        self._written = len(self._lines)


def _is_cut_off(log: Path) -> bool:
    """Whether a kill or a power cut left the last line of a log without its end: the next one must not be lost with it."""
    if not log.is_file() or not log.stat().st_size:
        return False
    with log.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def last_request(log: Path) -> dict[str, Any] | None:
    """The `features` of the last run that came to a ledger, as the log has them; None where it has none."""
    started = completed = None
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    for line in lines:
        try:
            entry = json.loads(line)
            if entry["event"] == "start":
                started = entry["request"]["features"]
            elif entry["event"] == "ledger":
                completed = started
        except (ValueError, KeyError, TypeError):  # a line that a kill cut off
            continue
    return completed


@contextmanager
def progress_line(
    total: int, done: int, description: str, refused: int
) -> Iterator[Callable[[int, dict[str, float], int], dict[str, Any]]]:
    """A line with pictures/s, time left, refused pictures and where the time goes, as shares of the tasks' seconds.

    What is yielded takes the pictures of a finished task, the seconds a stage and how many more are refused, and gives what
    there is to log.
    """
    spent: dict[str, float] = {}
    with tqdm(total=total, initial=done, desc=description, unit=" pictures", smoothing=0.1) as line:

        def advance(pictures: int, seconds: dict[str, float], more_refused: int) -> dict[str, Any]:
            nonlocal refused
            refused += more_refused
            for stage, more in seconds.items():
                spent[stage] = spent.get(stage, 0.0) + more
            whole = sum(spent.values()) or 1.0
            shares = {stage: round(part / whole, 3) for stage, part in spent.items()}
            notes = [f"{stage} {share:.0%}" for stage, share in shares.items()]
            line.set_postfix_str(", ".join([f"{refused} refused", *notes]), refresh=False)
            line.update(pictures)
            elapsed = line.format_dict["elapsed"]
            rate = (line.n - done) / elapsed if elapsed else 0.0
            return {
                "pictures": pictures,
                "seconds": {stage: round(part, 4) for stage, part in seconds.items()},
                "done": line.n,
                "of": total,
                "pictures_per_s": round(rate, 3),
                "left_s": round((total - line.n) / rate, 1) if rate else None,
                "shares": shares,
            }

        yield advance
