"""Arrays created or resumed, and their blocks written, each with a record."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from featurize.errors import UserError
from featurize.io.files import atomic_write, is_local, naming, remove_folder, to_disk, write_json
from featurize.store.layout import (
    METADATA,
    blocks_folder,
    chunk_path,
    is_sealed,
    metadata_path,
    record_path,
    seal_path,
    written_blocks,
)
from featurize.store.metadata import (
    ArraySpec,
    attributes_of,
    existing_metadata,
    is_as_copied,
    metadata_copy,
    read_metadata,
    rows_of_block,
)
from featurize.store.read import chunk_sizes, open_array
from featurize.store.seal import copy_metadata, read_record


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
    if existing_metadata(spec.path) is None:
        if records.exists():  # nothing says what these blocks are
            remove_folder(records)
        _create(spec)
    elif (copy := metadata_copy(spec.path)) is not None and not is_as_copied(spec.path):
        restore_metadata(spec.path, copy)
    whole = whole_blocks(spec)
    return [block for block in range(spec.blocks) if block not in whole]


def _create(spec: ArraySpec) -> None:
    """Write zarr.json and, before it, its copy: neither is ever there in part, as what zarr writes would be after a power cut."""
    import zarr
    from zarr.storage import MemoryStore

    store = MemoryStore()
    zarr.create_array(
        store,
        shape=spec.shape,
        chunks=(spec.rows_per_block, *spec.shape[1:]),
        dtype=spec.dtype,
        compressors=None,
        filters=None,
        fill_value=_fill_value(spec.dtype),
        attributes=attributes_of(spec),
    )
    document = json.loads(store._store_dict[METADATA].to_bytes())
    copy_metadata(spec.path, document)
    restore_metadata(spec.path, document)


def whole_blocks(spec: ArraySpec) -> set[int]:
    """The blocks that have a record, but for those whose record a power cut left without content, and those that a power cut or a
    kill left without a chunk; on a disk the records of these are dropped here."""
    written = written_blocks(spec.path)
    if not is_local(spec.path):  # where objects are whole: one listing says which chunks are there
        chunks = dict(chunk_sizes(spec.path)) if written else {}
        return {block for block in written if _chunk_name(spec, block) in chunks}
    whole = set()
    for block in written:
        chunk = chunk_path(spec.path, block, len(spec.shape))
        if read_record(spec, block) is not None and chunk.is_file() and chunk.stat().st_size == spec.bytes_per_block:
            whole.add(block)
        else:
            record_path(spec.path, block).unlink()
    return whole


def _chunk_name(spec: ArraySpec, block: int) -> str:
    return chunk_path(spec.path, block, len(spec.shape)).relative_to(spec.path).as_posix()


def restore_metadata(array: Path, document: dict[str, Any]) -> None:
    """Write an array's zarr.json, in the bytes that zarr writes."""
    with atomic_write(metadata_path(array)) as temporary:
        temporary.write_text(json.dumps(document, indent=2), encoding="utf-8")


def check_fingerprint(spec: ArraySpec) -> None:
    """Raises UserError when the path holds something that is not what `spec` describes."""
    metadata = existing_metadata(spec.path)
    if metadata is None:
        return
    stored = metadata.attributes
    if stored.get("fingerprint") != spec.fingerprint:
        provenance = stored.get("provenance")
        changed = _differences(provenance if isinstance(provenance, dict) else {}, spec.provenance)
        beside = seal_path(spec.path) if is_sealed(spec.path) else blocks_folder(spec.path)
        raise UserError(
            f"{spec.path} holds something made in another way (differs in: {', '.join(changed)}); choose another --out, or "
            f"remove it and {beside} first."
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
        write_block(spec, block, values[rows.start : rows.stop])


def check_same_array(spec: ArraySpec) -> None:
    """Raises UserError where another array lies at the path now: a worker of a cluster may still do a task of a command that has
    ended, when the next command has begun the array anew, of other images or otherwise."""
    if read_metadata(spec.path).attributes.get("fingerprint") != spec.fingerprint:
        raise UserError(
            f"{spec.path} was begun anew by another command while a block of it was made; run the same command again."
        )


def write_block(spec: ArraySpec, block: int, values: np.ndarray) -> None:
    """Write one whole chunk in one assignment, then its record: a block without a record does not exist.

    Raises UserError for NaN or infinite values, for values that the dtype can't hold, and as `check_same_array` does.
    """
    import zarr

    check_same_array(spec)
    path = spec.path
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
    with naming(path):
        array[rows.start : rows.stop] = stored
    if is_local(path):  # before the record: names may come later, which `prepare` and `seal` see to
        to_disk(chunk_path(path, block, array.ndim))
    chunk = np.full((rows_per_block, *array.shape[1:]), _fill_value(str(array.dtype)), dtype=array.dtype)
    chunk[: len(rows)] = stored
    data = chunk.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    record = {"rows": [rows.start, rows.stop], "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    # One that a power cut damages or takes is none: the block is done again.
    write_json(record_path(path, block), record, wait_for_name=False, wait_for_content=False)
