"""What a page says in a table is what stands beside its figure in numbers."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_of_levers_is_of_its_numbers(tmp_path: Path) -> None:
    script = runpy.run_path(str(DOCS / "figures" / "levers.py"))
    rows = json.loads((DOCS / "figures" / "levers.json").read_text())
    assert script["table"](rows) in (DOCS / "levers.md").read_text()
    script["draw"](rows, tmp_path / "levers.png")
    assert (tmp_path / "levers.png").stat().st_size > 10_000
