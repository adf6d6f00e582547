"""What an array is, from its zarr.json alone: zarr takes longer to import than all that asking again needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featurize.errors import UserError
from featurize.io.files import read_json


@dataclass(frozen=True)
class Header:
    """Shape, dtype and chunk shape of an array, and its attributes."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]
    attributes: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Of all rows, uncompressed as stores are."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def is_there(array: Path) -> bool:
    """Whether an array has been begun: a run that dies before its metadata is written leaves an empty folder at most."""
    return (array / "zarr.json").is_file()


def header_of(array: Path) -> Header:
    """The header of an array that is there. Raises UserError for a zarr.json that is damaged."""
    try:
        document = read_json(array / "zarr.json")
        chunks = document["chunk_grid"]["configuration"]["chunk_shape"]
        return Header(
            tuple(document["shape"]), document["data_type"], tuple(chunks), dict(document.get("attributes", {}))
        )
    except (UserError, KeyError, TypeError, AttributeError, ValueError):
        raise UserError(
            f"The store {array} is damaged (its zarr.json can't be read); `featurize repair` mends it."
        ) from None
