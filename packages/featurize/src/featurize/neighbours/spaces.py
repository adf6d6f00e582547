"""Spaces in which images are compared: a level, the mean of a map, `z_0`, or vectors in a file of their own.

Nothing here imports torch: the process that searches (search.py) reads its vectors through these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import zarr

from featurize.basis.pooling import pool, pooling_matrix
from featurize.recipe import parse_shape
from featurize.store.layout import base_path, encoder_folder
from featurize.store.read import open_sealed, read_rows, sealed_arrays, sealed_levels

PIXEL_SIDE  = 32  # of the raw-pixel baseline, at most                # fmt: skip
BLOCK_BYTES = 64 << 20  # of float32 vectors in memory at a time


class Space(Protocol):
    """A vector for each compared image, float32, read when they are needed."""

    @property
    def name(self) -> str: ...

    @property
    def group(self) -> str:
        """The encoder, or what else the spaces beside each other on the sheet have in common."""
        ...

    @property
    def count(self) -> int: ...

    @property
    def dimensions(self) -> int: ...

    def vectors(self, positions: np.ndarray) -> np.ndarray:
        """(n, D) float32 of the compared images at these positions."""
        ...


@dataclass(frozen=True)
class StoredSpace:
    """The compared rows (N, in rising order) of an array of a store.

    `how`: `flat` the whole map, `mean` its mean over positions, `pixels` an image pooled to PIXEL_SIDE, less its mean.
    """

    name: str
    group: str
    path: Path
    rows: np.ndarray
    how: str
    scale: np.ndarray  # (C,) of the channels compared; their number leaves out the others

    @property
    def count(self) -> int:
        return len(self.rows)

    @property
    def dimensions(self) -> int:
        h, w = _open(self.path).shape[2:4]
        places = {"mean": 1, "flat": h * w, "pixels": min(h, PIXEL_SIDE) * min(w, PIXEL_SIDE)}[self.how]
        return places * len(self.scale)

    def vectors(self, positions: np.ndarray) -> np.ndarray:
        stored = read_rows(_open(self.path), self.rows[positions], view=0)[..., : len(self.scale)]
        maps = stored.astype(np.float32) * self.scale.astype(np.float32)
        if self.how == "mean":
            return maps.mean(axis=(1, 2))
        if self.how == "pixels":
            h, w = maps.shape[1:3]
            maps = pool(maps, pooling_matrix(min(h, PIXEL_SIDE), h), pooling_matrix(min(w, PIXEL_SIDE), w))
        vectors = maps.reshape(len(maps), -1)
        return vectors - vectors.mean(axis=1, keepdims=True) if self.how == "pixels" else vectors


@lru_cache(maxsize=8)
def _open(path: Path) -> zarr.Array:
    """Opened once: checking a store looks at each of its chunks."""
    return open_sealed(path)


@dataclass(frozen=True)
class FileSpace:
    """Vectors (N, D) float32 in a .npy file, one per compared image."""

    name: str
    group: str
    path: Path

    @property
    def count(self) -> int:
        return len(self._file)

    @property
    def dimensions(self) -> int:
        return int(self._file.shape[1])

    @property
    def _file(self) -> np.ndarray:
        return np.load(self.path, mmap_mode="r")

    def vectors(self, positions: np.ndarray) -> np.ndarray:
        return np.array(self._file[positions])


def blocks(space: Space) -> Iterator[np.ndarray]:
    """All its vectors in order, BLOCK_BYTES at a time, each of unit length."""
    step = max(1, BLOCK_BYTES // (4 * space.dimensions))
    for start in range(0, space.count, step):
        yield unit(space.vectors(np.arange(start, min(start + step, space.count))))


def unit(x_ND: np.ndarray) -> np.ndarray:
    """Rows of length 1 (a row of zeros stays), float32: their inner products are cosines."""
    x = np.ascontiguousarray(x_ND, dtype=np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def encoder_spaces(root: Path, encoder: str, group: str, rows: np.ndarray) -> list[Space]:
    """The mean token in the basis, then every sealed level from the finest grid to the coarsest."""
    folder = encoder_folder(root, encoder)
    base = open_sealed(base_path(folder))
    h, w, channels = base.shape[2:]
    spaces: list[Space] = [StoredSpace(f"mean of {h}x{w}", group, base_path(folder), rows, "mean", np.ones(channels))]
    for path in sealed_levels(folder):
        level = open_sealed(path)
        # Compared as the encoder scales the channels: standardised, the faint trailing ones would drown the others.
        scale = np.array(level.attrs["std"], dtype=np.float32)
        spaces.append(StoredSpace(path.stem, group, path, rows, "flat", scale))
    return spaces


def image_spaces(root: Path, rows: np.ndarray) -> list[Space]:
    """What needs no encoder of features: `z_0` of each codec (moments by their means), stored pixels pooled."""
    spaces: list[Space] = []
    for path in sealed_arrays(root, "z0"):
        pixels = path.parent.name == "pixels"
        channels = parse_shape(path.stem)[2]
        name = "raw pixels" if pixels else f"z_0 {path.parent.name} {path.stem}"
        if all(space.name != name for space in spaces):
            how = "pixels" if pixels else "flat"
            spaces.append(StoredSpace(name, "pictures", path, rows, how, np.ones(channels)))
    return sorted(spaces, key=lambda space: space.name == "raw pixels")
