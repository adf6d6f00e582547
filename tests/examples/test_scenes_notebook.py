"""The notebook's cells run one after the other, on the hierarchy that ships, and show what they say."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.nestgen.conftest import one_thread as one_thread

NOTEBOOK = Path(__file__).parents[2] / "examples" / "scenes.ipynb"


def run_cell(code: str, space: dict[str, Any]) -> Any:
    """Runs a cell; returns the value of its last line where that is an expression, as a notebook shows it."""
    *statements, last = ast.parse(code).body
    if not isinstance(last, ast.Expr):
        statements, last = [*statements, last], None
    exec(compile(ast.Module(statements, []), "cell", "exec"), space)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), space)


def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(cells) == 10 and len(code) == 9
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells), "commit it without outputs"
    space: dict[str, Any] = {}
    shown = [run_cell(cell, space) for cell in code]
    assert shown[0] == [(16, 16, 6), (4, 4, 32), (1, 1, 64)]
    assert all(isinstance(shown[number], Image.Image) for number in (1, 2, 3, 4, 5, 6, 8))
    samples, variations, nearer = (space[name] for name in ("samples", "variations", "nearer"))
    assert (variations.latents[2] == samples.latents[2][3]).all()
    variation = [np.stack(one.images).std(axis=0).mean() for one in (samples, variations, nearer)]
    assert variation[0] > variation[1] > variation[2], "the more is frozen, the less samples vary"
    mean, std = (np.array(space["pipe"].about.statistics[1][name]) for name in ("mean", "std"))
    np.testing.assert_allclose((space["features"] - mean) / std, space["z_NHWC"], atol=1e-4)
    assert shown[7] == ((200, 64), space["root"].captions[0][0])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "(8, 4, 4, 32) float64"
    alike = [caption for caption, thing in zip(printed[-8:], THINGS) if thing in caption]
    assert len(alike) >= 5, printed  # 7 where this was written


# What samples 0 to 7 of seed 0 show, by eye; 0 cannot be named.
THINGS = ["nothing", "sun", "car", "car", "snowman", "snowman", "mushroom", "mushroom"]
