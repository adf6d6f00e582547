"""The latents of a sample folder: one zarr array per level, written block by block, so a run can go on."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import zarr
from torch import Tensor

from nestgen.errors import UserError
from nestgen.files import read_json, sync, write_json, writing


@dataclass(frozen=True)
class Latents:
    """Latents of one level, (count, h, w, c) float32, at FOLDER/latents/z<l>.zarr.

    A block is one chunk of rows. It exists once its record, z<l>.blocks/<first row>.json, does: the record is
    written last and holds the digest of the values.
    """

    path: Path
    array: zarr.Array

    @property
    def records(self) -> Path:
        """The folder of the blocks' records; it is there once a block is."""
        return self.path.with_suffix(".blocks")

    def blocks(self, rows: range | None = None) -> Iterator[range]:
        """The rows of each block, in order; only of the blocks that hold some of `rows`, if they are given."""
        count, block = self.array.shape[0], self.array.chunks[0]
        start, stop = (0, count) if rows is None else (rows.start // block * block, rows.stop)
        for first in range(start, stop, block):
            yield range(first, min(first + block, count))

    def has(self, rows: range) -> bool:
        """Whether a block is there, with as many rows: the last one of a smaller count is another."""
        record = _record(self.path, rows)
        return record.is_file() and read_json(record)["rows"] == [rows.start, rows.stop]

    def write(self, rows: range, z_BCHW: Tensor) -> None:
        """Writes a block of (B, C, H, W). Raises UserError for values that are not finite."""
        if not z_BCHW.isfinite().all():
            raise UserError(
                f"{self.path.stem} of images {rows.start} to {rows.stop - 1} came out not finite; "
                "its denoiser has diverged: train it again with a lower training.lr"
            )
        values = np.ascontiguousarray(z_BCHW.permute(0, 2, 3, 1).cpu().numpy(), dtype="<f4")
        with writing(self.path):
            self.array[rows.start : rows.stop] = values
            sync(self.path.joinpath("c", str(rows.start // self.array.chunks[0]), "0", "0", "0"))  # before its record
        write_json(_record(self.path, rows), {"rows": [rows.start, rows.stop], "sha256": _digest(values)})

    def read(self, rows: range) -> Tensor:
        """Whole blocks as (B, C, H, W). Raises UserError where one is not there or not what was written."""
        z_BHWC = np.concatenate([self._read_block(block) for block in self.blocks(rows)])
        return torch.from_numpy(z_BHWC).permute(0, 3, 1, 2).contiguous()  # sums round by layout

    def _read_block(self, rows: range) -> np.ndarray:
        if not self.has(rows):
            raise UserError(
                f"{self.path} is unfinished: images {rows.start} to {rows.stop - 1} are not there; "
                "run the same `nestgen sample` again"
            )
        values = np.asarray(self.array[rows.start : rows.stop])
        if read_json(_record(self.path, rows))["sha256"] != _digest(values):
            raise UserError(
                f"{self.path} is damaged at images {rows.start} to {rows.stop - 1}; remove "
                f"{_record(self.path, rows)} and run the same `nestgen sample` again"
            )
        return values

    def read_all(self) -> np.ndarray:
        """All latents as (count, h, w, c), with the checks of `read`."""
        return np.concatenate([self._read_block(rows) for rows in self.blocks()])


def create_latents(folder: Path, level: int, shape: tuple[int, int, int, int], block: int) -> Latents:
    """The latents of a level in a sample folder: those there if any block is, else new ones of `block` rows each.

    A run that goes on keeps the block size it began with, and may go on to more rows.
    """
    path = latents_path(folder, level)
    if any(path.with_suffix(".blocks").glob("*.json")):
        latents = open_latents(folder, level)
        if latents.array.shape[0] < shape[0]:
            latents.array.resize(shape)
        return latents
    with writing(path):
        array = zarr.create_array(
            path,
            shape=shape,
            chunks=(min(block, shape[0]), *shape[1:]),
            dtype="<f4",
            compressors=None,
            fill_value=np.nan,
            overwrite=True,
        )
    return Latents(path, array)


def open_latents(folder: Path, level: int) -> Latents:
    """The latents of a level in a sample folder, or UserError where there are none."""
    path = latents_path(folder, level)
    if not path.is_dir():
        raise UserError(f"{folder} has no latents of z_{level}; run `nestgen sample --out {folder}`")
    try:
        return Latents(path, zarr.open_array(path, mode="r+"))
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:  # whatever zarr raises for its zarr.json
        raise UserError(
            f"{path} is damaged ({type(error).__name__}); remove it and {path.with_suffix('.blocks')}, and run the same "
            "`nestgen sample` again"
        ) from None


def written_shape(folder: Path, level: int) -> tuple[int, int] | None:
    """(rows, rows of a block) of a level's latents; None where no block is there."""
    path = latents_path(folder, level)
    if not any(path.with_suffix(".blocks").glob("*.json")):
        return None
    array = open_latents(folder, level).array
    return array.shape[0], array.chunks[0]


def remove_latents(folder: Path, level: int) -> None:
    """Removes the latents of a level: first the records, without which no block exists."""
    path = latents_path(folder, level)
    shutil.rmtree(path.with_suffix(".blocks"), ignore_errors=True)
    shutil.rmtree(path, ignore_errors=True)


def latents_path(folder: Path, level: int) -> Path:
    """The array of a level in a sample folder."""
    return folder / "latents" / f"z{level}.zarr"


def _record(path: Path, rows: range) -> Path:
    return path.with_suffix(".blocks") / f"{rows.start:06d}.json"


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values, dtype="<f4").tobytes()).hexdigest()
