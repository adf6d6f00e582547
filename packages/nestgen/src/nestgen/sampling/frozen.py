"""Levels that are not sampled but taken from real rows, or from image 0 of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upath import UPath

from nestgen.errors import UserError
from nestgen.recipe.recipe import Recipe
from nestgen.sampling.real import open_real
from nestgen.stores.hierarchy import check_same_rows
from nestgen.stores.store import Store, read_seal


@dataclass(frozen=True)
class FrozenSource:
    """Where levels `freeze_from` and above come from.

    `row` of the store root `root` for all images; where `row` is None, row i for image i; where `root` is None, image
    0 of the run.
    """

    freeze_from: int
    root: Path | UPath | None = None
    row: int | None = None

    def rows(self, indices: Sequence[int]) -> list[int]:
        """The row that each image is frozen to."""
        return list(indices) if self.row is None else [self.row] * len(indices)

    def describe(self, store: Store | None) -> dict[str, Any]:
        """The entry of a level's card."""
        if store is None:
            return {"image": 0}
        row = "each" if self.row is None else self.row
        path = store.path.absolute() if isinstance(store.path, Path) else store.path
        return {"row": row, "store": str(path), "store_sha256": read_seal(store.path)["sha256"]}


def open_frozen_stores(
    recipe: Recipe, source: FrozenSource, count: int, fingerprints: Sequence[str]
) -> dict[int, Store]:
    """The stores of the levels that `count` images are frozen to, by level; none for image 0.

    `fingerprints` are of the stores that the denoisers were trained on, z_0's first. Raises UserError for a level that
    cannot be frozen, and for rows that are not there.
    """
    check_freeze_from(recipe, source.freeze_from)
    if source.root is None:
        return {}
    levels = range(source.freeze_from, len(recipe.levels))
    stores = {level: open_real(recipe, level, source.root, fingerprints[level]) for level in levels}
    first = stores[source.freeze_from]
    for store in stores.values():
        check_same_rows(first, store)
    if (last := source.row if source.row is not None else count - 1) >= first.rows:
        what = f"row {last}" if source.row is not None else f"a row for each of {count} images"
        raise UserError(f"{first.path} has rows 0 to {first.rows - 1}, not {what}; name another row, or fewer images")
    return stores


def check_freeze_from(recipe: Recipe, level: int) -> None:
    """Raises UserError unless a level of the recipe can be frozen and something sampled below it."""
    top = len(recipe.levels) - 1
    if not top:
        raise UserError(f"a hierarchy of one level has none to freeze: {recipe.file} needs more levels, or --depth")
    if not 1 <= level <= top:
        raise UserError(
            f"--freeze-from {level} is not within 1..{top}: z_0 is always sampled, and the levels of {recipe.file} end "
            f"at z_{top}"
        )
