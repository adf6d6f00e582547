"""The arms of the levers' table are valid recipes, each other than the plain one in what its name says."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.lever_arms import arms_of
from benchmarks.levers import DATA, RECIPES, document_of, merged, recipe_at
from nestgen.recipe.recipe import load_recipe


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
