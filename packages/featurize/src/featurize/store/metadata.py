"""What an array is to be, and what its zarr.json says it is. No zarr here: importing it takes longer than asking again."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featurize.errors import UserError
from featurize.io.files import read_json
from featurize.store.layout import metadata_path, seal_path
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
    return hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()


def rows_of_block(block: int, rows_per_block: int, rows: int) -> range:
    """The rows of one block of an array with so many rows."""
    return range(block * rows_per_block, min(rows, (block + 1) * rows_per_block))


def read_metadata(array: Path) -> ArrayMetadata:
    """The metadata of an array that is there. Raises UserError for a zarr.json that is damaged."""
    try:
        document = read_json(metadata_path(array))
        chunks = document["chunk_grid"]["configuration"]["chunk_shape"]
        return ArrayMetadata(
            tuple(document["shape"]), document["data_type"], tuple(chunks), dict(document.get("attributes", {}))
        )
    except (UserError, KeyError, TypeError, AttributeError, ValueError):
        raise UserError(
            f"The store {array} is damaged (its zarr.json can't be read); run `featurize repair` to fix it."
        ) from None


def metadata_in_seal(array: Path) -> dict[str, Any] | None:
    """The copy of zarr.json in an array's seal; None where it is damaged, or missing as in seals of earlier versions."""
    try:
        seal = read_json(seal_path(array))
        return seal["metadata"] if fingerprint(seal["metadata"]) == seal["metadata_sha256"] else None
    except (UserError, OSError, KeyError, TypeError):
        return None


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
