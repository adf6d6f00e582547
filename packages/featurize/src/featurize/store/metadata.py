"""What an array is to be, and what its zarr.json says it is. No zarr here: importing it takes longer than asking again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featurize.errors import UserError
from featurize.io.files import json_sha256, read_json
from featurize.store.layout import has_metadata, is_sealed, metadata_copy_path, metadata_path, seal_path
from featurize.versions import version

FORMAT = "nested-store/1"
COMMON = ("format", "kind", "rows", "views", "block_rows", "keys_sha256", "fingerprint", "provenance", "versions")
LIBRARIES = ("featurize", "numpy", "torch", "timm", "pillow", "zarr")


@dataclass(frozen=True)
class ArraySpec:
    """What an array is to be before it is written: shape (rows, ...), dtype, and the attributes that describe it."""

    path: Path
    kind: str
    shape: tuple[int, ...]
    dtype: str
    rows_per_block: int
    keys_sha256: str
    provenance: dict[str, Any]
    attributes: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.provenance)

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.rows_per_block)

    @property
    def bytes_per_block(self) -> int:
        return self.rows_per_block * math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize

    def rows_of(self, block: int) -> range:
        return rows_of_block(block, self.rows_per_block, self.rows)


@dataclass(frozen=True)
class ArrayMetadata:
    """Shape, dtype and chunk shape of an array, and its attributes."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]
    attributes: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows; stores are not compressed."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def fingerprint(provenance: dict[str, Any]) -> str:
    """SHA-256 of everything that decides the values, spelled out as JSON with sorted keys."""
    return json_sha256(provenance)


def rows_of_block(block: int, rows_per_block: int, rows: int) -> range:
    """The rows of one block of an array with so many rows."""
    return range(block * rows_per_block, min(rows, (block + 1) * rows_per_block))


def read_metadata(array: Path) -> ArrayMetadata:
    """The metadata of an array that is there. Raises UserError for a zarr.json that is damaged or lost."""
    try:
        return _metadata_of(read_json(metadata_path(array)))
    except (UserError, FileNotFoundError, KeyError, TypeError, AttributeError, ValueError):
        raise UserError(
            f"The store {array} is damaged (its zarr.json can't be read); run `featurize repair` to fix it."
        ) from None


def existing_metadata(array: Path) -> ArrayMetadata | None:
    """The metadata of an array that has been created, None where nothing says what it is.

    Of an unfinished array the copy among its records counts, so that a damaged zarr.json stops nothing. Raises UserError for a
    damaged zarr.json of a sealed one.
    """
    if is_sealed(array):
        return read_metadata(array) if has_metadata(array) else None
    try:
        copy = metadata_copy(array)
        return _metadata_of(copy) if copy is not None else read_metadata(array)
    except (UserError, OSError):
        return None


def changed_keys(begun_with: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    """What is another in a network's identity than in that of the network which an array was begun with, by its provenance.

    Keys that later versions added to the identity do not count.
    """
    return [key for key in sorted(begun_with) if identity.get(key) != begun_with[key]]


def _metadata_of(document: dict[str, Any]) -> ArrayMetadata:
    chunks = document["chunk_grid"]["configuration"]["chunk_shape"]
    return ArrayMetadata(
        tuple(document["shape"]), document["data_type"], tuple(chunks), dict(document.get("attributes", {}))
    )


def metadata_copy(array: Path) -> dict[str, Any] | None:
    """The copy of zarr.json in an array's seal, or among the records of an unfinished one; None where there is no whole copy,
    as in arrays of earlier versions."""
    try:
        document = read_json(seal_path(array) if is_sealed(array) else metadata_copy_path(array))
        return document["metadata"] if json_sha256(document["metadata"]) == document["metadata_sha256"] else None
    except (UserError, OSError, KeyError, TypeError):
        return None


def is_as_copied(array: Path) -> bool:
    """Whether an array's zarr.json can be read and says what its copy says, where there is one."""
    try:
        read_metadata(array)
        return metadata_copy(array) in (None, read_json(metadata_path(array)))
    except (UserError, OSError):
        return False


def attributes_of(spec: ArraySpec) -> dict[str, Any]:
    """The attributes that zarr.json holds of an array."""
    common = {
        "format": FORMAT,
        "kind": spec.kind,
        "rows": spec.rows,
        "views": spec.shape[1] if len(spec.shape) > 1 else 1,
        "block_rows": spec.rows_per_block,
        "keys_sha256": spec.keys_sha256,
        "fingerprint": spec.fingerprint,
        "provenance": spec.provenance,
        "versions": {name: version(name) for name in LIBRARIES},
    }
    return common | spec.attributes


def spec_of(path: Path, metadata: ArrayMetadata | None = None) -> ArraySpec:
    """The spec that an array was created from. Raises UserError for a damaged array, KeyError where it is not of a store."""
    metadata = metadata or read_metadata(path)
    attributes = metadata.attributes
    return ArraySpec(
        path,
        attributes["kind"],
        metadata.shape,
        metadata.dtype,
        attributes["block_rows"],
        attributes["keys_sha256"],
        attributes["provenance"],
        {key: value for key, value in attributes.items() if key not in COMMON},
    )


def spec_or_none(array: Path) -> ArraySpec | None:
    """The spec that an array was created from; None where its zarr.json is damaged or missing."""
    try:
        return spec_of(array)
    except (UserError, OSError, KeyError):
        return None
