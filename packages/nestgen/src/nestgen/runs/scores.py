"""scores.jsonl of a run: what its previews found, a line for each, which decides the best checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nestgen.errors import UserError
from nestgen.files import atomic_write, sync, with_digest, without_digest, writing

FILE = "scores.jsonl"


def append(folder: Path, step: int, frechet_distance: float) -> None:
    """Adds the line of a step; it is on the disk when this returns."""
    file = folder / FILE
    with writing(file):
        with file.open("a") as lines:
            lines.write(_line({"step": step, "frechet_distance": frechet_distance}))
        sync(file)


def read(folder: Path) -> list[dict[str, Any]]:
    """Step and `frechet_distance` of each line, in order; without a last line that a kill or a power cut left half written.

    Raises UserError for any other line that is not what was written: without it another checkpoint would be the best.
    """
    file = folder / FILE
    *lines, rest = file.read_text(errors="replace").split("\n") if file.is_file() else [""]
    records = []
    for number, line in enumerate([*lines, rest] if "}" in rest else lines, start=1):
        try:
            record = without_digest(json.loads(line))
            records.append({"step": int(record["step"]), "frechet_distance": float(record["frechet_distance"])})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{file} is damaged in line {number}; restore it from a copy, or remove that line"
            ) from None
    return records


def truncate(folder: Path, step: int) -> None:
    """Removes the lines after `step`: a resumed training writes them again."""
    if (folder / FILE).is_file():
        lines = [_line(record) for record in read(folder) if record["step"] <= step]
        with atomic_write(folder / FILE) as draft:
            draft.write_text("".join(lines))


def _line(record: dict[str, Any]) -> str:
    return json.dumps(with_digest(record)) + "\n"
