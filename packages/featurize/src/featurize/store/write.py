"""Arrays created or resumed, and their blocks written, each with a record."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from featurize.errors import UserError
from featurize.io.files import atomic_write, is_local, remove_folder, to_disk, write_json
from featurize.store.layout import (
    blocks_folder,
    chunk_path,
    has_metadata,
    is_sealed,
    metadata_path,
    record_path,
    written_blocks,
)
from featurize.store.metadata import ArraySpec, attributes_of, read_metadata, rows_of_block
from featurize.store.read import open_array, zarr_address


def prepare(spec: ArraySpec) -> list[int]:
    """Create the array, or resume one that is there; the blocks still to write, none when it is sealed.

    Raises UserError when the path holds something with another fingerprint.
    """
    check_fingerprint(spec)
    records = blocks_folder(spec.path)
    if is_sealed(spec.path):
        if records.exists():  # a run ended between the seal and the removal of the records
            remove_folder(records)
        return []
    if not has_metadata(spec.path):
        import zarr

        zarr.create_array(
            **zarr_address(spec.path),
            shape=spec.shape,
            chunks=(spec.rows_per_block, *spec.shape[1:]),
            dtype=spec.dtype,
            compressors=None,
            filters=None,
            fill_value=_fill_value(spec.dtype),
            attributes=attributes_of(spec),
        )
    if is_local(records):
        records.mkdir(parents=True, exist_ok=True)
    written = written_blocks(spec.path)
    return [block for block in range(spec.blocks) if block not in written]


def restore_metadata(array: Path, document: dict[str, Any]) -> None:
    """Write an array's zarr.json, in the bytes that zarr writes."""
    with atomic_write(metadata_path(array)) as temporary:
        temporary.write_text(json.dumps(document, indent=2), encoding="utf-8")


def check_fingerprint(spec: ArraySpec) -> None:
    """Raises UserError when the path holds something that is not what `spec` describes."""
    if not has_metadata(spec.path):
        return
    stored = read_metadata(spec.path).attributes
    if stored.get("fingerprint") != spec.fingerprint:
        provenance = stored.get("provenance")
        changed = _differences(provenance if isinstance(provenance, dict) else {}, spec.provenance)
        raise UserError(
            f"{spec.path} holds something made in another way (differs in: {', '.join(changed)}); "
            "choose another --out, or remove it first."
        )


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        first, second = old.get(key), new.get(key)
        if isinstance(first, dict) and isinstance(second, dict):
            names += _differences(first, second, f"{prefix}{key}.")
        elif first != second:
            names.append(f"{prefix}{key}")
    return names


def _fill_value(dtype: str) -> float | int:
    return float("nan") if np.dtype(dtype).kind == "f" else -1


def write_array(spec: ArraySpec, values: np.ndarray) -> None:
    """Write the blocks that an array lacks whose values (rows, ...) are all in memory."""
    for block in prepare(spec):
        rows = spec.rows_of(block)
        write_block(spec.path, block, values[rows.start : rows.stop])


def write_block(path: Path, block: int, values: np.ndarray) -> None:
    """Write one whole chunk in one assignment, then its record: a block without a record does not exist.

    Raises UserError for NaN or infinite values and for values that the dtype can't hold.
    """
    import zarr

    # Without this zarr would leave out a chunk that holds nothing but fill values.
    with zarr.config.set({"array.write_empty_chunks": True}):
        array = open_array(path, mode="r+")
    rows_per_block = array.chunks[0]
    rows = rows_of_block(block, rows_per_block, array.shape[0])
    if values.shape != (len(rows), *array.shape[1:]):
        raise ValueError(f"block {block} of {path} has shape {values.shape}, expected {(len(rows), *array.shape[1:])}")
    with np.errstate(over="ignore"):
        stored = values.astype(array.dtype)
    if stored.dtype.kind == "f" and not np.isfinite(stored).all():
        raise UserError(
            f"Rows {rows.start} to {rows.stop - 1} of {path} would hold NaN, infinite or too large values; "
            "check the encoder's weights and precision."
        )
    array[rows.start : rows.stop] = stored
    if is_local(path):  # the data must not be younger than its record after a power cut
        chunk_file = chunk_path(path, block, array.ndim)
        for written in (chunk_file, *chunk_file.parents[: array.ndim + 1]):
            to_disk(written)
    chunk = np.full((rows_per_block, *array.shape[1:]), _fill_value(str(array.dtype)), dtype=array.dtype)
    chunk[: len(rows)] = stored
    data = chunk.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    record = {"rows": [rows.start, rows.stop], "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_json(record_path(path, block), record)
