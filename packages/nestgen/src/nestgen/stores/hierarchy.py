"""Stores that belong together: the levels of a hierarchy, labels and captions, row r of all from the same image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nestgen.errors import UserError
from nestgen.recipe.locations import features_path, store_path, store_root
from nestgen.recipe.recipe import Recipe
from nestgen.recipe.sections import shape_name
from nestgen.stores.store import Store, open_store, remake


def open_hierarchy(recipe: Recipe, levels: Sequence[int] | None = None) -> tuple[Store, ...]:
    """The stores of all levels of a recipe, or of some: of its shapes, and of the same rows and views."""
    stores = []
    for level in range(len(recipe.levels)) if levels is None else levels:
        store, shape = open_store(store_path(recipe, level)), recipe.levels[level].shape
        if store.latent_shape != shape:
            raise UserError(
                f"{store.path} holds latents of {shape_name(store.latent_shape)}, "
                f"but levels[{level}].shape of {recipe.file} is {shape_name(shape)}; {remake(store.path)}"
            )
        stores.append(store)
    for store in stores[1:]:
        check_same_rows(stores[0], store)
        if store.views != stores[0].views:
            raise UserError(
                f"{store.path} has {store.views} view(s) and {stores[0].path} has {stores[0].views}; "
                "extract both with the same --views"
            )
    return tuple(stores)


def check_same_rows(one: Store, other: Store) -> None:
    """Raises UserError unless row r is the same image in both."""
    if one.attributes["keys_sha256"] != other.attributes["keys_sha256"]:
        raise UserError(
            f"{one.path} ({one.rows} rows) and {other.path} ({other.rows} rows) are not of the same "
            "images; extract both from one source with `featurize extract`"
        )


def read_labels(recipe: Recipe, reference: Store) -> np.ndarray:
    """Classes (rows,) int64 of a store's rows; an image without one gets the null class, `denoiser.labels`."""
    store = open_store(store_root(recipe) / "labels.zarr")
    check_same_rows(reference, store)
    labels, classes = store.load(), recipe.denoiser.labels
    if labels.max() >= classes:
        raise UserError(
            f"{store.path} has a class {labels.max()}, but denoiser.labels of {recipe.file} is {classes}; "
            f"set it to {labels.max() + 1} or more"
        )
    if (labels < 0).all():
        raise UserError(f"{store.path} has no labels; set denoiser.labels of {recipe.file} to 0")
    return known_labels(labels, classes)


def known_labels(labels: np.ndarray, classes: int) -> np.ndarray:
    """Labels as denoisers of so many classes take them: none, or one of another data set's, is the null class, `classes`."""
    return np.where((labels < 0) | (labels >= classes), classes, labels)


@dataclass(frozen=True)
class Captions:
    """Embedded captions: those of row r are text rows offsets[r] to offsets[r + 1] - 1; text row 0 is the empty one."""

    text: Store  # (captions + 1, tokens, width)
    offsets: np.ndarray  # (rows + 1,)

    def sample(self, rows: np.ndarray, uniform_N: np.ndarray) -> np.ndarray:
        """A text row for each row (N,), by a uniform number each; the empty caption where a row has none."""
        first, count = self.offsets[rows], np.diff(self.offsets)[rows]
        return np.where(count > 0, first + (uniform_N * count).astype(np.int64), 0)


def read_captions(recipe: Recipe, reference: Store) -> Captions:
    """The captions of a store's rows, of the shape that denoiser.text names."""
    assert recipe.denoiser.text is not None
    folder = store_root(recipe) / "text"
    text, offsets = open_store(folder / f"{shape_name(recipe.denoiser.text)}.zarr"), open_store(folder / "offsets.zarr")
    for store in (text, offsets):
        check_same_rows(reference, store)
    values = offsets.load()
    if text.shape[1:] != recipe.denoiser.text or len(values) != reference.rows + 1 or values[-1] != text.rows:
        raise UserError(f"{offsets.path} does not fit {text.path} and {reference.rows} rows; {remake(text.path)}")
    if values[-1] == 1:
        raise UserError(f"{text.path} has no captions; set denoiser.text of {recipe.file} to null")
    return Captions(text, values)


@dataclass(frozen=True)
class LevelStores:
    """What a level's denoiser is trained on."""

    z: Store
    above: tuple[Store, ...]  # the levels that condition this one, the nearest first
    labels: np.ndarray | None  # (rows,) int64
    captions: Captions | None
    features: Store | None = None  # that the denoiser is aligned to

    def arrays(self) -> list[Store]:
        """All that takes memory; labels and offsets are read already."""
        further = [self.captions.text] if self.captions else []
        return [self.z, *self.above, *further, *([self.features] if self.features else [])]

    def in_memory(self) -> LevelStores:
        """The same stores, read whole into memory."""
        captions = self.captions and replace(self.captions, text=self.captions.text.in_memory())
        return replace(
            self,
            z=self.z.in_memory(),
            above=tuple(store.in_memory() for store in self.above),
            captions=captions,
            features=self.features and self.features.in_memory(),
        )


def open_level(recipe: Recipe, level: int) -> LevelStores:
    """Opens a level's store, those that condition it and, where the recipe has them, labels and captions."""
    z, *above = open_hierarchy(recipe, (level, *recipe.conditions(level)))
    labels = read_labels(recipe, z) if recipe.denoiser.labels else None
    captions = read_captions(recipe, z) if recipe.denoiser.text else None
    features = _open_features(recipe, z) if recipe.training.align and level == 0 else None
    return LevelStores(z, tuple(above), labels, captions, features)


def _open_features(recipe: Recipe, reference: Store) -> Store:
    """The base store, of as many channels as `features.base_channels`."""
    store = open_store(features_path(recipe))
    check_same_rows(reference, store)
    if store.shape[-1] != recipe.features.base_channels:
        raise UserError(
            f"{store.path} has {store.shape[-1]} channels, but features.base_channels of {recipe.file} is "
            f"{recipe.features.base_channels}; set it to {store.shape[-1]}"
        )
    return store
