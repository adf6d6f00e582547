"""A sealed store, read by memory map, from memory or from remote storage (docs/store-format.md)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import zarr
from upath import UPath

from nestgen.errors import UserError
from nestgen.files import json_sha256
from nestgen.stores.remote import RemoteBlocks, read

FORMAT = "nested-store/1"
FEW = 32  # rows per block, below which they are copied one by one


@dataclass(frozen=True)
class Store:
    """An array of a store root: (rows, views, h, w, c) float16, labels (rows,) int64, or captions.

    `blocks` are its chunks, each (block_rows, *rest): memory maps of the files, or read from remote storage on demand.
    In memory there is one, the whole array.
    """

    path: Path | UPath
    attributes: dict[str, Any]
    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Sequence[np.ndarray] | RemoteBlocks
    block_rows: int

    @property
    def rows(self) -> int:
        """Number of images, or of what else has a row."""
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
        """Bytes of all values."""
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
            for position, (number, place) in enumerate(zip(block.tolist(), index.tolist())):
                out[position] = self.blocks[number][tuple(place)]
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
        """The same store, read whole into memory."""
        return replace(self, blocks=(self.load(),), block_rows=self.rows)


def open_store(path: Path | UPath) -> Store:
    """Opens NAME.zarr if it is sealed and whole; otherwise raises UserError and says how to fix it."""
    seal_path = path.with_suffix(".seal.json")
    if not path.is_dir():
        raise UserError(f"there is no store {path}; make it with `{_made_by(path)}`")
    if not seal_path.is_file():
        raise UserError(f"{path} is unfinished: it has no {seal_path.name}; finish it with `{_made_by(path)}`")
    try:
        seal = read_seal(path)
        array = zarr.open_array(str(path), mode="r")
        attributes = dict(array.attrs)
        if "metadata" in seal and json.loads(read(path / "zarr.json")) != seal["metadata"]:
            raise UserError(f"{path} is damaged: its zarr.json is not what was written; {remake(path)}")
        formats = {seal["format"], attributes["format"]}
        if formats != {FORMAT}:
            others = ", ".join(sorted(formats - {FORMAT}))
            raise UserError(f"{path} has format {others}, and this nestgen reads {FORMAT}; extract it again")
        if any(seal[key] != attributes[key] for key in ("rows", "block_rows", "keys_sha256", "fingerprint")):
            raise UserError(f"{path} and its seal disagree; {remake(path)}")
        if array.compressors or array.dtype.str not in ("<f2", "<i8"):
            raise UserError(f"{path} is not uncompressed little-endian float16 or int64; {remake(path)}")
        whole = array.shape[0] == seal["rows"] and array.chunks == (seal["block_rows"], *array.shape[1:])
        if not whole or len(seal["blocks"]) != -(-seal["rows"] // seal["block_rows"]):
            raise UserError(f"{path} has other rows or blocks than its seal; {remake(path)}")
        count = len(seal["blocks"])
        blocks: Sequence[np.ndarray] | RemoteBlocks
        if isinstance(path, Path):
            blocks = tuple(_map_block(path, number, array.chunks, array.dtype) for number in range(count))
        else:
            blocks = RemoteBlocks(path, count, array.chunks, array.dtype)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); {remake(path)}") from None
    return Store(path, attributes, array.shape, array.dtype, blocks, seal["block_rows"])


def read_seal(path: Path | UPath) -> dict[str, Any]:
    """The seal of a store. Raises UserError where it is damaged; seals of earlier versions have no digest of their own."""
    try:
        seal: dict[str, Any] = json.loads(read(path.with_suffix(".seal.json")))
        digest = seal.pop("seal_sha256", None)
        blocks = hashlib.sha256("".join(str(block.get("sha256")) for block in seal["blocks"]).encode()).hexdigest()
        whole = digest in (None, json_sha256(seal)) and seal.get("sha256", blocks) == blocks
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"the seal of {path} is damaged; {remake(path)}")
    return seal


def _map_block(path: Path, number: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    chunk = path.joinpath("c", str(number), *["0"] * (len(shape) - 1))
    size = chunk.stat().st_size if chunk.is_file() else None
    expected = int(np.prod(shape)) * dtype.itemsize
    if size != expected:
        state = "is missing" if size is None else f"has {size} bytes instead of {expected}"
        raise UserError(f"{path} is damaged: block {number} {state}; {remake(path)}")
    # asarray: indexing a np.memmap costs several times what indexing its buffer does.
    return np.asarray(np.memmap(chunk, dtype, "r", shape=shape))


def _made_by(path: Path | UPath) -> str:
    """The command that makes a store: a level comes from its base store where that is sealed."""
    if path.parent.name == "text":
        return "featurize embed-text"
    if path.stem.count("x") != 2 or not (path.parent / "base.seal.json").is_file():
        return "featurize extract"
    try:
        encoder = json.loads(read(path.parent / "base.zarr" / "zarr.json"))["attributes"]["encoder"]
    except (OSError, ValueError, LookupError, TypeError):  # damaged too: its own message is for the next command
        return f"featurize levels {path.stem}"
    return f"featurize levels {path.stem} --encoder {quote(str(encoder))} --out {quote(str(path.parent.parent))}"


def remake(path: Path | UPath) -> str:
    """What to do about a store that is damaged or does not fit, for the end of a message."""
    return f"run `featurize repair`, or remove it with its seal and run `{_made_by(path)}`"
