"""The arms of the levers' table are valid recipes, each other than the plain one in what its name says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.levers import DATA, RECIPES, arms_of, document_of, merged, recipe_at, without_bias
from nestgen.recipe.recipe import load_recipe
from nestgen.scoring.frechet import frechet_distance


@pytest.mark.parametrize("data", DATA)
def test_every_arm_is_a_recipe_of_its_own(data: str, tmp_path: Path) -> None:
    plain = recipe_at(tmp_path, document_of(data, tmp_path, [], 1))
    assert plain.seed == 1
    arms = arms_of(data).items()
    recipes = {name: recipe_at(tmp_path, document_of(data, tmp_path, changes, 1)) for name, changes in arms}
    assert recipes.pop("today") == plain
    assert all(recipe != plain for recipe in recipes.values())
    assert {len(recipe.levels) for recipe in recipes.values()} == {len(plain.levels)}


@pytest.mark.parametrize("data", DATA)
def test_the_best_arm_is_what_the_recipe_took(data: str, tmp_path: Path) -> None:
    best = recipe_at(tmp_path, document_of(data, tmp_path, arms_of(data)[f"{data}' best"], 1))
    mini = load_recipe(RECIPES / DATA[data])
    steps = {"steps": best.training.steps, "warmup": best.training.warmup}
    assert best.training.model_copy(update=steps) == mini.training.model_copy(update=steps)
    assert (best.levels, best.denoiser, best.process) == (mini.levels, mini.denoiser, mini.process)
    assert best.sampling == mini.sampling


def test_changes_reach_into_sections_and_into_every_level() -> None:
    document = {"a": {"b": 1, "c": 2}, "levels": [{"shape": "2x2x2"}, {"shape": "1x1x2", "sigma": 1}]}
    changed = merged(document, {"a": {"c": 3, "d": 4}, "levels": {"shift": "auto"}})
    assert changed["a"] == {"b": 1, "c": 3, "d": 4}
    assert changed["levels"] == [{"shape": "2x2x2", "shift": "auto"}, {"shape": "1x1x2", "sigma": 1, "shift": "auto"}]
    assert document["a"] == {"b": 1, "c": 2}
    assert merged(document, {"levels": {0: {"shape": "4x4x2"}}})["levels"] == [
        {"shape": "4x4x2"},
        document["levels"][1],
    ]


def test_a_distance_without_bias_is_that_of_the_distributions() -> None:
    rng, dimensions = np.random.default_rng(0), 64
    x_ND, y_ND = rng.standard_normal((2, 1000, dimensions))
    shifted_ND = 1.5 * y_ND + 0.25  # |mean|² + tr (1 + 1.5² - 2 · 1.5) of each dimension
    expected = dimensions * (0.25**2 + 0.5**2)
    assert frechet_distance(x_ND, shifted_ND) > expected + 1
    assert without_bias(x_ND, shifted_ND) == pytest.approx(expected, abs=0.5)
    assert without_bias(x_ND, y_ND) == pytest.approx(0, abs=0.2)
    assert without_bias(x_ND[:dimensions], y_ND) is None
