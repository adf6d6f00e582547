"""What a page says in a table is what stands beside its figure in numbers."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("data", sorted(file.stem.split("-")[1] for file in DOCS.glob("figures/levers-*.json")))
def test_the_table_of_levers_is_of_its_numbers(data: str, tmp_path: Path) -> None:
    script = runpy.run_path(str(DOCS / "figures" / "levers.py"))
    rows = json.loads(script["file_of"](data).read_text())
    assert script["table"](data, rows) in (DOCS / "levers.md").read_text()
    script["draw"](data, rows, tmp_path / "levers.png")
    assert (tmp_path / "levers.png").stat().st_size > 10_000
