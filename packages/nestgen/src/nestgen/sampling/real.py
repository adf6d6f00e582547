"""Real pictures in the hierarchy: rows of a store root as latents, and levels frozen to them or to a sample."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestgen import randomness as noise
from nestgen.errors import UserError
from nestgen.recipe.recipe import Recipe, store_path
from nestgen.stores.latent import to_latent
from nestgen.stores.store import Store, check_same_rows, open_store


@dataclass(frozen=True)
class Source:
    """What levels `freeze_from` and above are taken from.

    A row of a store root; row i for image i, where `row` is None; or image 0 of the run's own seed, where `root` is
    None.
    """

    freeze_from: int
    root: Path | None = None
    row: int | None = None

    def rows_of(self, indices: Sequence[int]) -> list[int]:
        """The row that each image is like."""
        return list(indices) if self.row is None else [self.row] * len(indices)

    def describe(self, store: Store | None) -> dict[str, Any]:
        """For a level's card."""
        if store is None:
            return {"image": 0}
        row = "each" if self.row is None else self.row
        path = store.path.absolute() if isinstance(store.path, Path) else store.path
        return {"row": row, "store": str(path), "store_sha256": seal_of(store)["sha256"]}


def training_root(recipe: Recipe) -> Path:
    """The store root that the denoisers are trained on."""
    return recipe.root / recipe.features.out


def seal_of(store: Store) -> dict[str, Any]:
    """The seal of a store: its digest is `sha256`."""
    document: dict[str, Any] = json.loads(store.path.with_suffix(".seal.json").read_text(encoding="utf-8"))
    return document


def open_real(recipe: Recipe, level: int, root: Path, fingerprint: str | None = None) -> Store:
    """A level's store in a root whose values mean what those mean that the denoisers were trained on.

    `fingerprint` is of the store that the level's denoiser was trained on, if it was recorded. Raises UserError where
    the training store is another by now, or the two differ in basis, standardisation or codec.
    """
    trained_on = open_store(store_path(recipe, level, training_root(recipe)))
    if fingerprint is not None and trained_on.attributes["fingerprint"] != fingerprint:
        raise UserError(
            f"{trained_on.path} is not the store that z_{level}'s denoiser was trained on: it was extracted again; "
            "train and sample again"
        )
    if root.resolve() == training_root(recipe).resolve():
        return trained_on
    real = open_store(store_path(recipe, level, root))
    check_comparable(real, trained_on)
    return real


def check_comparable(one: Store, other: Store) -> None:
    """Values mean the same only in one basis, standardisation and codec. Raises UserError for others."""
    for key in ("basis_sha256", "mean", "std"):
        if one.attributes.get(key) != other.attributes.get(key):
            raise UserError(
                f"{one.path} and {other.path} differ in {key}; extract one of them with --basis and the other's root"
            )
    codecs = [
        {key: value for key, value in store.attributes.get("codec", {}).items() if key != "weights"}
        for store in (one, other)
    ]
    if codecs[0] != codecs[1]:
        raise UserError(f"{one.path} and {other.path} come from different codecs; extract both with one z_0 codec")


def real_latents(store: Store, rows: Sequence[int], seed: int) -> Tensor:
    """Rows of a level as its denoiser sees them, (B, C, H, W); of VAE moments one sample a row."""
    h, w, c = store.latent_shape
    index = np.asarray(rows, np.int64)
    stored = store.read(index, np.zeros_like(index))
    posterior_BCHW = noise.normal(seed, "evaluate/posterior", index.tolist(), (c, h, w))
    return to_latent(stored, store.attributes.get("codec"), posterior_BCHW)


def open_source(recipe: Recipe, source: Source, count: int, fingerprints: Sequence[str]) -> dict[int, Store]:
    """The stores of the levels that a source of real rows freezes, by level.

    Raises UserError for a level that the recipe does not have, and for rows that are not there.
    """
    depth = len(recipe.levels)
    check_freeze(recipe, source.freeze_from)
    if source.root is None:
        return {}
    stores = {
        level: open_real(recipe, level, source.root, fingerprints[level]) for level in range(source.freeze_from, depth)
    }
    first = stores[source.freeze_from]
    for store in stores.values():
        check_same_rows(first, store)
    if (last := source.row if source.row is not None else count - 1) >= first.rows:
        what = f"row {last}" if source.row is not None else f"a row for each of {count} images"
        raise UserError(f"{first.path} has rows 0 to {first.rows - 1}, not {what}; name another row, or fewer images")
    return stores


def check_freeze(recipe: Recipe, level: int) -> None:
    """Raises UserError unless a level of the recipe can be frozen and something drawn below it."""
    top = len(recipe.levels) - 1
    if not top:
        raise UserError(f"a hierarchy of one level has none to freeze: {recipe.file} needs more levels, or --depth")
    if not 1 <= level <= top:
        raise UserError(
            f"--freeze-from {level} is not within 1..{top}: z_0 is drawn, and the levels of {recipe.file} end at z_{top}"
        )


def frozen_levels(stores: dict[int, Store], source: Source, indices: Sequence[int], seed: int) -> dict[int, Tensor]:
    """The frozen levels of some images."""
    return {level: real_latents(store, source.rows_of(indices), seed) for level, store in stores.items()}


def labels_of_rows(recipe: Recipe, source: Source, like: Store, indices: Sequence[int]) -> Tensor | None:
    """Classes of the rows that images are like; None where the recipe or a picture has none."""
    if not recipe.denoiser.labels or source.root is None:
        return None
    store = open_store(source.root / "labels.zarr")
    check_same_rows(like, store)
    labels = store.read(np.asarray(source.rows_of(indices), np.int64))
    return torch.from_numpy(np.where(labels < 0, recipe.denoiser.labels, labels).astype(np.int64))
