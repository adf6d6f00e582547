"""The notebook's cells run one after the other, on a small hierarchy in place of the one that ships."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nestgen import NestedPipeline
from nestgen.sharing import names
from tests.nestgen.conftest import experiment as experiment
from tests.nestgen.conftest import one_thread as one_thread
from tests.nestgen.conftest import trained as trained
from tests.nestgen.sharing.test_export import make_run

NOTEBOOK = Path(__file__).parents[2] / "examples" / "scenes.ipynb"


def run_cell(code: str, space: dict[str, Any]) -> Any:
    """Runs a cell; returns the value of its last line where that is an expression, as a notebook shows it."""
    *statements, last = ast.parse(code).body
    if not isinstance(last, ast.Expr):
        statements, last = [*statements, last], None
    exec(compile(ast.Module(statements, []), "cell", "exec"), space)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), space)


def test_every_cell_runs(trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(trained, tmp_path)
    pipe = NestedPipeline.from_run(run)
    about = replace(pipe.about, statistics={1: {"mean": [3.0] * 6, "std": [2.0] * 6}})
    replace(pipe, exported=about).save_pretrained(tmp_path / "shipped" / "scenes")
    monkeypatch.setattr(names, "SHIPPED", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(cells) == 10 and len(code) == 9
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells), "commit it without outputs"
    space: dict[str, Any] = {}
    shown = [run_cell(cell, space) for cell in code]
    assert shown[0] == [(8, 8, 3), (4, 4, 6), (2, 2, 4)]
    assert all(isinstance(image, Image.Image) for image in shown[1:6])
    assert (shown[6][0], space["features"][0, 0, 0, 0]) == ((8, 4, 4, 6), 2 * space["z_NHWC"][0, 0, 0, 0] + 3)
    assert shown[7][0] == (64, 64)
    assert len(shown[8]) == 8 and all(isinstance(caption, str) for caption in shown[8])
    frozen = space["pipe"](num_images=1, frozen=space["frozen"], progress=False)
    assert (frozen.latents[2][0] == space["samples"].latents[2][3]).all()
