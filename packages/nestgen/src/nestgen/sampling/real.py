"""Real images in the hierarchy: rows of store roots, as latents that mean what those mean that were trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from upath import UPath

from nestgen import randomness
from nestgen.errors import UserError
from nestgen.recipe.locations import resolve_path, store_path, store_root
from nestgen.recipe.recipe import Recipe
from nestgen.stores.hierarchy import check_same_rows, known_labels
from nestgen.stores.latent import to_latent
from nestgen.stores.store import Store, open_store


def reference_root(recipe: Recipe, reference: Path | UPath | None) -> Path | UPath:
    """The store root to score against: `reference`, else the recipe's evaluation.reference, else the training rows'."""
    if reference is not None:
        return reference
    own = recipe.evaluation.reference
    return store_root(recipe) if own is None else resolve_path(recipe.root, own)


def open_real(recipe: Recipe, level: int, root: Path | UPath, fingerprint: str | None = None) -> Store:
    """A level's store in a root, checked to have the basis, standardisation and codec of the training rows.

    `fingerprint` is that of the store that the level's denoiser was trained on, if it was recorded. Raises UserError
    where the two differ, and where the training store was extracted again since.
    """
    trained_on = open_store(store_path(recipe, level, store_root(recipe)))
    if fingerprint is not None and trained_on.attributes["fingerprint"] != fingerprint:
        raise UserError(
            f"{trained_on.path} is not the store that z_{level}'s denoiser was trained on: it was extracted again; "
            "train and sample again"
        )
    if root.resolve() == store_root(recipe).resolve():
        return trained_on
    real = open_store(store_path(recipe, level, root))
    check_comparable(real, trained_on)
    return real


def check_comparable(one: Store, other: Store) -> None:
    """Raises UserError for stores of different bases, standardisations or codecs: their values mean different things."""
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
    """Rows of a level as its denoiser sees them, float32 (B, C, H, W); of VAE moments one sample for each row."""
    h, w, c = store.latent_shape
    index = np.asarray(rows, np.int64)
    stored = store.read(index, np.zeros_like(index))
    codec = store.attributes.get("codec")
    posterior_BCHW = None
    if codec is not None and codec["moments"]:
        posterior_BCHW = randomness.normal(seed, "evaluate/posterior", index.tolist(), (c, h, w))
    return to_latent(stored, codec, posterior_BCHW)


def labels_of_rows(root: Path | UPath, store: Store, rows: Sequence[int], classes: int) -> Tensor:
    """Classes (B) int64, as denoisers of so many take them, of rows of a store root, of which `store` is one."""
    labels_store = open_store(root / "labels.zarr")
    check_same_rows(store, labels_store)
    labels = labels_store.read(np.asarray(rows, np.int64))
    return torch.from_numpy(known_labels(labels, classes).astype(np.int64))
