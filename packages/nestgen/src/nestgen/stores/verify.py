"""Whether the stores of a training are still what was written: every block against the digest in its seal."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm
from upath import UPath

from nestgen.errors import UserError
from nestgen.recipe.locations import features_path, store_path, store_root
from nestgen.recipe.recipe import Recipe
from nestgen.recipe.sections import shape_name
from nestgen.stores.remote import read
from nestgen.stores.store import open_store, read_seal, remake


def verify_level(recipe: Recipe, level: int) -> None:
    """Reads everything that a level is trained on. Raises UserError for the first damaged block."""
    for path in _stores(recipe, level):
        verify_store(path)


def verify_store(path: Path | UPath) -> None:
    """Reads a store whole, several blocks at a time. Raises UserError for a block that is not what was written."""
    store = open_store(path)
    recorded = [block["sha256"] for block in read_seal(path)["blocks"]]

    def digest(number: int) -> str:
        chunk = path.joinpath("c", str(number), *["0"] * (len(store.shape) - 1))
        return hashlib.sha256(read(chunk)).hexdigest()

    with ThreadPoolExecutor() as pool:
        found = tqdm(pool.map(digest, range(len(recorded))), f"verify {path.name}", len(recorded), unit="block")
        for number, (one, other) in enumerate(zip(found, recorded)):
            if one != other:
                pool.shutdown(wait=False, cancel_futures=True)
                raise UserError(
                    f"{path} is damaged: block {number} is not what was written (its SHA-256 differs); {remake(path)}"
                )


def _stores(recipe: Recipe, level: int) -> Iterator[Path | UPath]:
    """The paths of the stores that `open_level` opens."""
    root = store_root(recipe)
    for one in (level, *recipe.conditions(level)):
        yield store_path(recipe, one)
    if recipe.denoiser.labels:
        yield root / "labels.zarr"
    if recipe.denoiser.text:
        yield root / "text" / f"{shape_name(recipe.denoiser.text)}.zarr"
        yield root / "text" / "offsets.zarr"
    if recipe.training.align and level == 0:
        yield features_path(recipe)
