"""A store root opened for reading: its arrays by name, and what the ledger says of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from featurize.errors import UserError
from featurize.io.files import resolve_path
from featurize.store.layout import is_sealed, list_arrays
from featurize.store.ledger import Ledger, read_ledger
from featurize.store.metadata import read_metadata
from featurize.store.read import open_sealed

if TYPE_CHECKING:
    import zarr

    from featurize.access.dataset import LatentDataset

KINDS = ("z0", "level", "base")  # the arrays with a row and a view for each image


@dataclass(frozen=True)
class StoreRoot:
    """A store root on disk or in a bucket, made by `featurize.open`; nothing but the ledger is read until it is used.

    `paths` holds the finished arrays by name, z_0 first, then the levels, then the base store: `pixels/32x32x3`,
    `tiny/4x4x16`, `tiny/base`. Each has the shape (rows, views, h, w, c) and float16 values.

    `root["tiny/4x4x16"]` is the zarr array: sliced it is numpy, and its `attrs` hold mean, std, encoder and codec
    (docs/store-format.md). The folder may be left out where only one has an array of that name: `root["4x4x16"]`.
    """

    path: Path
    ledger: Ledger
    paths: dict[str, Path]

    def __len__(self) -> int:
        """Number of rows: the images that are stored."""
        return self.ledger.rows

    def __getitem__(self, name: str) -> zarr.Array:
        """The array of that name. Raises KeyError for an unknown name, UserError for a damaged array."""
        return open_sealed(self.paths[self.full_name(name)])

    @property
    def levels(self) -> list[str]:
        """Names of the levels above z_0, from the finest grid to the coarsest of each encoder."""
        return [name for name, path in self.paths.items() if read_metadata(path).attributes["kind"] == "level"]

    @property
    def keys(self) -> list[str]:
        """The key of each row: the image's name in its source."""
        return self.ledger.keys

    @cached_property
    def labels(self) -> np.ndarray:
        """(rows,) int64, -1 where an image has none."""
        return self.ledger.labels

    @property
    def classes(self) -> tuple[str, ...]:
        """The name of each label; empty where labels have no names."""
        return self.ledger.classes

    @cached_property
    def captions(self) -> list[tuple[str, ...]]:
        """The captions of each row."""
        return [tuple(own) for own in self.ledger.table["captions"].to_pylist()]

    def full_name(self, name: str) -> str:
        """`tiny/4x4x16` of `4x4x16`. Raises KeyError where there is none, or more than one."""
        found = [full for full in self.paths if name in (full, full.partition("/")[2])]
        if len(found) != 1:
            problem = f"has {len(found)} arrays {name!r}: {', '.join(found)}" if found else f"has no array {name!r}"
            raise KeyError(f"{self.path} {problem}; its arrays are {', '.join(self.paths) or 'not finished'}")
        return found[0]

    def dataset(self, *names: str, view: int | None = None, captions: bool = False) -> LatentDataset:
        """The arrays of these names as a torch Dataset, one sample a row; without names the levels above z_0.

        A sample is a dict: `row` and `label` (int), and under each name given the latent, float32 (c, h, w), of one `view`
        (0 is the image, 1 its flip); with `view` None all of them, (views, c, h, w). With `captions` also `captions`, a tuple
        of texts; as rows have different numbers of them, a DataLoader then needs `collate_fn=featurize.collate`.

        Raises KeyError for an unknown name, ValueError for a view that is not stored.
        """
        from featurize.access.dataset import LatentDataset  # imports torch

        arrays = {name: self[name] for name in names or self.levels}
        for name, array in arrays.items():
            if view is not None and not 0 <= view < array.shape[1]:
                raise ValueError(
                    f"view is {view!r} and {name} has {array.shape[1]}; give 0 for the image, 1 for its flip"
                )
        paths = {name: self.paths[self.full_name(name)] for name in arrays}
        return LatentDataset(paths, self.labels, self.captions if captions else None, view)


def open_root(root: str | Path) -> StoreRoot:
    """A store root for reading: a folder that `featurize extract` made, or an address like s3://bucket/root.

    Raises UserError where there is none, or none of its arrays is finished.
    """
    path = resolve_path(root)
    ledger = read_ledger(path)
    found = {array: read_metadata(array) for array in list_arrays(path) if is_sealed(array)}
    kinds = {array: metadata.attributes["kind"] for array, metadata in found.items()}
    arrays = [array for array in found if kinds[array] in KINDS]
    if not arrays:
        raise UserError(f"{path} has no finished array; run the command that was making it again, it goes on.")

    def from_z0_up(array: Path) -> tuple[int, str, int]:
        height, width = found[array].shape[2:4]
        return KINDS.index(kinds[array]), array.parent.name, -height * width

    return StoreRoot(
        path, ledger, {f"{array.parent.name}/{array.stem}": array for array in sorted(arrays, key=from_z0_up)}
    )
