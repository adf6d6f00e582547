"""One flipped bit in a seal or in an array's description is named when the store is opened, or changes nothing."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from nestgen.errors import UserError
from nestgen.recipe.locations import store_path, store_root
from nestgen.recipe.recipe import load_recipe
from nestgen.stores.store import open_store


@pytest.mark.parametrize("name", ["z0", "labels"])
def test_a_flip_in_a_seal_or_a_description(experiment: Callable[..., Path], name: str) -> None:
    recipe = load_recipe(experiment(classes=3, denoiser={"size": "nano", "labels": 3}))
    path = Path(store_path(recipe, 0)) if name == "z0" else Path(store_root(recipe)) / "labels.zarr"
    described, sealed = path / "zarr.json", path.with_suffix(".seal.json")
    seal = json.loads(sealed.read_text()) | {
        "metadata": json.loads(described.read_text())
    }  # as docs/store-format.md says
    seal["seal_sha256"] = hashlib.sha256(json.dumps(seal, sort_keys=True).encode()).hexdigest()
    sealed.write_text(json.dumps(seal))
    whole, chance, sentences = open_store(path), random.Random(0), []
    for number in range(200):
        file = (described, sealed)[number % 2]
        content = file.read_bytes()
        place = chance.randrange(len(content))
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :])
        try:
            found = open_store(path)
            assert (found.attributes, found.shape, found.dtype) == (whole.attributes, whole.shape, whole.dtype), place
            assert (found.load() == whole.load()).all()
        except UserError as error:
            sentences.append(str(error))
        file.write_bytes(content)
    assert len(sentences) > 180
    assert all("damaged" in one for one in sentences)
