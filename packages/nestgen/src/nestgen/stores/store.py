"""Sealed stores, read by memory map, from memory or from afar (docs/store-format.md)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from upath import UPath

from nestgen.errors import UserError
from nestgen.recipe.recipe import Recipe, store_path, store_root
from nestgen.recipe.sections import shape_name
from nestgen.stores.remote import RemoteBlocks, read

FORMAT = "nested-store/1"
FEW = 32  # rows a block, below which they are copied one by one


@dataclass(frozen=True)
class Store:
    """An array of a store root: (rows, views, h, w, c) float16, labels (rows,) int64, or captions.

    `blocks` are its chunks, each (block_rows, *rest): memory maps of the files, or what is read of them from afar. In
    memory there is one, the whole array.
    """

    path: Path | UPath
    attributes: dict[str, Any]
    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Sequence[np.ndarray] | RemoteBlocks
    block_rows: int

    @property
    def rows(self) -> int:
        """How many pictures."""
        return int(self.attributes["rows"])

    @property
    def views(self) -> int:
        """1, or 2 where the horizontal flip is stored as well."""
        return int(self.attributes["views"])

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of the latent a denoiser sees; moments are stored with 2c channels."""
        h, w, c = self.attributes["latent_shape"]
        return h, w, c

    @property
    def nbytes(self) -> int:
        """Of all values."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def read(self, rows: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        """The values of (row, view) pairs as stored, (n, *rest); in the order given. Labels have no view."""
        rows = np.asarray(rows, np.int64)
        if len(rows) and not (rows.min() >= 0 and rows.max() < self.rows):
            raise IndexError(f"row out of 0..{self.rows - 1}")
        block, within = np.divmod(rows, self.block_rows)
        index = within[:, None] if views is None else np.stack([within, views], 1)
        out = np.empty((len(rows), *self.shape[index.shape[1] :]), self.dtype)
        if isinstance(self.blocks, tuple) and len(rows) < FEW * len(self.blocks):
            # A training batch meets most blocks with a row or two: then numpy's fancy indexing costs more than copying.
            for place, (number, where) in enumerate(zip(block.tolist(), index.tolist())):
                out[place] = self.blocks[number][tuple(where)]
            return out
        order = np.argsort(block, kind="stable")
        for members in np.split(order, np.flatnonzero(np.diff(block[order])) + 1):
            if len(members):
                out[members] = self.blocks[block[members[0]]][tuple(index[members].T)]
        return out

    def load(self) -> np.ndarray:
        """The whole array in memory."""
        return np.concatenate([self.blocks[number] for number in range(len(self.blocks))])[: self.rows]

    def in_memory(self) -> Store:
        """The same store, read once and kept."""
        return replace(self, blocks=(self.load(),), block_rows=self.rows)


def open_store(path: Path | UPath) -> Store:
    """Opens NAME.zarr if it is sealed and whole; otherwise raises UserError and says what mends it."""
    seal_path = path.with_suffix(".seal.json")
    if not path.is_dir():
        raise UserError(f"there is no store {path}; make it with `{_command(path)}`")
    if not seal_path.is_file():
        raise UserError(f"{path} is unfinished: it has no {seal_path.name}; finish it with `{_command(path)}`")
    try:
        seal = json.loads(read(seal_path))
        array = zarr.open_array(str(path), mode="r")
        attributes = dict(array.attrs)
        formats = {seal["format"], attributes["format"]}
        if formats != {FORMAT}:
            found = ", ".join(sorted(formats - {FORMAT}))
            raise UserError(f"{path} has format {found}, and this nestgen reads {FORMAT}; extract it again")
        if any(seal[key] != attributes[key] for key in ("rows", "block_rows", "keys_sha256", "fingerprint")):
            raise UserError(f"{path} and its seal disagree; {_remake(path)}")
        if array.compressors or array.dtype.str not in ("<f2", "<i8"):
            raise UserError(f"{path} is not uncompressed little-endian float16 or int64; {_remake(path)}")
        whole = array.shape[0] == seal["rows"] and array.chunks == (seal["block_rows"], *array.shape[1:])
        if not whole or len(seal["blocks"]) != -(-seal["rows"] // seal["block_rows"]):
            raise UserError(f"{path} has other rows or blocks than its seal; {_remake(path)}")
        count = len(seal["blocks"])
        blocks: Sequence[np.ndarray] | RemoteBlocks
        if isinstance(path, Path):
            blocks = tuple(_map_block(path, number, array.chunks, array.dtype) for number in range(count))
        else:
            blocks = RemoteBlocks(path, count, array.chunks, array.dtype)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); {_remake(path)}") from None
    return Store(path, attributes, array.shape, array.dtype, blocks, seal["block_rows"])


def _map_block(path: Path, number: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    chunk = path.joinpath("c", str(number), *["0"] * (len(shape) - 1))
    size = chunk.stat().st_size if chunk.is_file() else None
    expected = int(np.prod(shape)) * dtype.itemsize
    if size != expected:
        state = "is missing" if size is None else f"has {size} bytes instead of {expected}"
        raise UserError(f"{path} is damaged: block {number} {state}; {_remake(path)}")
    # asarray: indexing a np.memmap costs several times what indexing its buffer does.
    return np.asarray(np.memmap(chunk, dtype, "r", shape=shape))


def _command(path: Path | UPath) -> str:
    """The command that makes a store: a level comes from its base store where that is sealed."""
    if path.parent.name == "text":
        return "featurize embed-text"
    from_base = path.stem.count("x") == 2 and (path.parent / "base.seal.json").is_file()
    return f"featurize levels {path.stem}" if from_base else "featurize extract"


def _remake(path: Path | UPath) -> str:
    return f"remove it and run `{_command(path)}`"


def open_hierarchy(recipe: Recipe, levels: Sequence[int] | None = None) -> tuple[Store, ...]:
    """The stores of all levels of a recipe, or of some: of its shapes, and of the same rows and views."""
    stores = []
    for level in range(len(recipe.levels)) if levels is None else levels:
        store, shape = open_store(store_path(recipe, level)), recipe.levels[level].shape
        if store.latent_shape != shape:
            raise UserError(
                f"{store.path} holds latents of {shape_name(store.latent_shape)}, "
                f"but levels[{level}].shape of {recipe.file} is {shape_name(shape)}; {_remake(store.path)}"
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
    """Raises UserError unless row r is the same picture in both."""
    if one.attributes["keys_sha256"] != other.attributes["keys_sha256"]:
        raise UserError(
            f"{one.path} ({one.rows} rows) and {other.path} ({other.rows} rows) are not of the same "
            "pictures; extract both from one source with `featurize extract`"
        )


def read_labels(recipe: Recipe, like: Store) -> np.ndarray:
    """Classes (rows,) int64 of the rows of `like`; a picture without one gets the null class, `labels`."""
    store = open_store(store_root(recipe) / "labels.zarr")
    check_same_rows(like, store)
    labels, classes = store.load(), recipe.denoiser.labels
    if labels.max() >= classes:
        raise UserError(
            f"{store.path} has a class {labels.max()}, but denoiser.labels of {recipe.file} is {classes}; "
            f"set it to {labels.max() + 1} or more"
        )
    if (labels < 0).all():
        raise UserError(f"{store.path} has no labels; set denoiser.labels of {recipe.file} to 0")
    return np.where(labels < 0, classes, labels)


@dataclass(frozen=True)
class Captions:
    """Embedded captions: those of row r are text rows offsets[r] to offsets[r + 1] - 1; text row 0 is the empty one."""

    text: Store  # (captions + 1, tokens, width)
    offsets: np.ndarray  # (rows + 1,)

    def draw(self, rows: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """A text row for each row, by a uniform number each; the empty caption where a row has none."""
        first, count = self.offsets[rows], np.diff(self.offsets)[rows]
        return np.where(count > 0, first + (uniform * count).astype(np.int64), 0)


def read_captions(recipe: Recipe, like: Store) -> Captions:
    """The captions of the rows of `like`, of the shape that denoiser.text names."""
    assert recipe.denoiser.text is not None
    folder = store_root(recipe) / "text"
    text, offsets = open_store(folder / f"{shape_name(recipe.denoiser.text)}.zarr"), open_store(folder / "offsets.zarr")
    for store in (text, offsets):
        check_same_rows(like, store)
    values = offsets.load()
    if text.shape[1:] != recipe.denoiser.text or len(values) != like.rows + 1 or values[-1] != text.rows:
        raise UserError(f"{offsets.path} does not fit {text.path} and {like.rows} rows; {_remake(text.path)}")
    if values[-1] == 1:
        raise UserError(f"{text.path} has no captions; set denoiser.text of {recipe.file} to null")
    return Captions(text, values)
