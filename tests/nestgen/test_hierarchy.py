"""The hierarchy sheet: its rows, and that freezing more leaves less to vary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from nestgen.cli import main
from nestgen.decode import to_uint8
from nestgen.draw import sample_below
from nestgen.files import read_json
from nestgen.hierarchy import hierarchy, variation
from nestgen.models import load_models
from nestgen.recipe import load_recipe


def test_rows_freeze_from_the_top_and_share_the_first_picture(
    trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(trained())
    monkeypatch.chdir(recipe.root)
    run = CliRunner().invoke(main, ["hierarchy", "--columns", "5", "--seed", "3"])
    assert run.exit_code == 0, run.output
    card = read_json(tmp_path / "hierarchy.json")
    assert [row["frozen"] for row in card["rows"]] == [[], [2], [1, 2]]
    assert all(row["variation"] > 0 for row in card["rows"])
    assert (card["samples"]["seed"], card["samples"]["depth"]) == (3, 3)
    sheet = np.asarray(Image.open(tmp_path / "hierarchy.png"))
    rows = [sheet[4 + 100 * row :][:96, -500:-4][:, :96] for row in range(3)]  # first column, 8 px enlarged
    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(rows[0], rows[2])
    second = [sheet[4 + 100 * row :][:96, -400:-304] for row in range(3)]
    assert not np.array_equal(second[0], second[2])


def test_one_level_has_nothing_to_freeze(trained: Callable[..., Path], tmp_path: Path) -> None:
    hierarchy(load_recipe(trained()).depth(1), tmp_path / "h.png", columns=3, seed=0)
    assert [row["frozen"] for row in read_json(tmp_path / "h.json")["rows"]] == [[]]


def test_variation_is_averaged_over_frozen_samples(trained: Callable[..., Path], tmp_path: Path) -> None:
    recipe = load_recipe(trained())
    hierarchy(recipe, tmp_path / "h.png", columns=6, seed=1)
    models = load_models(recipe, torch.device("cpu"))
    z = sample_below(models, range(6), 1, {})
    expected = []
    for image in range(4):
        frozen = {level: torch.cat([z[level][image : image + 1]] * 6) for level in (1, 2)}
        expected.append(variation(to_uint8(sample_below(models, range(6), 1, frozen)[0])))
    rows = read_json(tmp_path / "h.json")["rows"]
    assert rows[0]["variation"] == pytest.approx(variation(to_uint8(z[0])))
    assert rows[2]["variation"] == pytest.approx(np.mean(expected))


def test_variation_is_the_standard_deviation_over_pictures() -> None:
    pictures = np.zeros((2, 4, 4, 3), np.uint8)
    assert variation(pictures) == 0
    pictures[1, :2] = 100
    assert variation(pictures) == 25  # half the pixels, 50 each
