"""Every block of a level's stores is compared with its digest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nestgen.errors import UserError
from nestgen.recipe.locations import store_root
from nestgen.recipe.recipe import load_recipe
from nestgen.stores.verify import verify_level, verify_store


def test_a_flip_in_any_store_of_a_level_is_found(
    experiment: Callable[..., Path], store_writer: Callable[..., Path]
) -> None:
    recipe = load_recipe(experiment(classes=3, denoiser={"size": "nano", "labels": 3}, training={"align": {}}))
    root = store_root(recipe)
    store_writer(root / "tiny" / "base.zarr", np.zeros((40, 1, 4, 4, 6), "<f2"), kind="base", keys=["one"])
    verify_level(recipe, 0)
    for chunk, block in (
        ("pixels/8x8x3.zarr/c/4/0/0/0/0", 4),
        ("tiny/4x4x6.zarr/c/0/0/0/0/0", 0),
        ("labels.zarr/c/3", 3),
        ("tiny/base.zarr/c/2/0/0/0/0", 2),
    ):
        content = (root / chunk).read_bytes()
        (root / chunk).write_bytes(content[:-1] + bytes([content[-1] ^ 128]))
        with pytest.raises(
            UserError, match=rf"{chunk.split('/c/')[0]} is damaged: block {block} is not what was written"
        ):
            verify_level(recipe, 0)
        (root / chunk).write_bytes(content)
    verify_level(recipe, 0)


def test_a_flipped_digest_in_a_seal_is_found(experiment: Callable[..., Path]) -> None:
    path = store_root(load_recipe(experiment())) / "labels.zarr"
    seal = json.loads(path.with_suffix(".seal.json").read_text())
    digest = seal["blocks"][1]["sha256"]
    for damaged in ({"sha256": "0" + digest[1:]}, {}):
        seal["blocks"][1] = {"rows": [8, 16], "bytes": 64, **damaged}
        path.with_suffix(".seal.json").write_text(json.dumps(seal))
        with pytest.raises(UserError, match=r"the seal of .* is damaged"):
            verify_store(path)
