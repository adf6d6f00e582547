"""How a level's denoiser follows from the recipe."""

from __future__ import annotations

import json
from pathlib import Path

from nestgen.denoiser.config import SIZES, denoiser_config
from nestgen.recipe.recipe import load_recipe


def test_a_level_may_have_a_size_of_its_own(tmp_path: Path) -> None:
    levels = [{"shape": "8x8x4", "size": "mini"}, {"shape": "4x4x8"}]
    recipe = {"name": "toy", "features": {"out": "stores"}, "levels": levels, "denoiser": {"size": "nano"}}
    recipe["features"] |= {"z0": "vae:64"}
    (tmp_path / "toy.yaml").write_text(json.dumps(recipe))
    loaded = load_recipe(tmp_path / "toy.yaml")
    configs = [denoiser_config(loaded, level) for level in (0, 1)]
    assert [(one.dim, one.depth, one.heads) for one in configs] == [SIZES["mini"], SIZES["nano"]]
