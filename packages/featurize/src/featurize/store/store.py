"""Plain zarr arrays with a record a block and a seal at the end (docs/store-format.md)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featurize.errors import UserError
from featurize.execution.engine import Run, in_order, run_here
from featurize.io.files import is_local, read_json, remove_folder, to_disk, write_json
from featurize.store.metadata import Header, header_of, is_there
from featurize.versions import version

if TYPE_CHECKING:  # its import takes longer than asking again
    import zarr

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
    block_rows: int
    keys_sha256: str
    provenance: dict[str, Any]
    attributes: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.provenance)

    @property
    def blocks(self) -> int:
        return -(-self.shape[0] // self.block_rows)


def folder_name(encoder: str) -> str:
    """The folder of an encoder's arrays below the store root."""
    return encoder.replace(":", "-").replace("/", "-")


def fingerprint(provenance: dict[str, Any]) -> str:
    """SHA-256 of everything that decides the values, spelled out as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()


def rows_of(block: int, block_rows: int, rows: int) -> range:
    """The rows of one block."""
    return range(block * block_rows, min(rows, (block + 1) * block_rows))


def seal_path(array: Path) -> Path:
    return array.with_suffix(".seal.json")


def is_sealed(array: Path) -> bool:
    return seal_path(array).is_file()


def opened(path: Path, mode: Any = "r") -> zarr.Array:
    """The zarr array at a path of a local disk or of a bucket."""
    import zarr

    return zarr.open_array(**_address(path), mode=mode)


def _address(path: Path) -> dict[str, Any]:
    options = {} if is_local(path) else dict(path.storage_options)  # type: ignore[attr-defined]
    return {"store": str(path)} | ({"storage_options": options} if options else {})


def prepare(spec: ArraySpec) -> list[int]:
    """Create the array, or take up one that is there; the blocks still to write, none when it is sealed.

    Raises UserError when the path holds something with another fingerprint.
    """
    refuse_other(spec)
    records = blocks_folder(spec.path)
    if is_sealed(spec.path):
        if records.exists():  # a run ended between the seal and the tidying up
            remove_folder(records)
        return []
    if not is_there(spec.path):
        import zarr

        zarr.create_array(
            **_address(spec.path),
            shape=spec.shape,
            chunks=(spec.block_rows, *spec.shape[1:]),
            dtype=spec.dtype,
            compressors=None,
            filters=None,
            fill_value=_fill(spec.dtype),
            attributes=_attributes(spec),
        )
    if is_local(records):
        records.mkdir(parents=True, exist_ok=True)
    written = written_blocks(spec.path)
    return [block for block in range(spec.blocks) if block not in written]


def refuse_other(spec: ArraySpec) -> None:
    """Raise UserError when the path holds something that is not what `spec` describes."""
    if not is_there(spec.path):
        return
    found = header_of(spec.path).attributes
    if found.get("fingerprint") != spec.fingerprint:
        provenance = found.get("provenance")
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


def _attributes(spec: ArraySpec) -> dict[str, Any]:
    common = {
        "format": FORMAT,
        "kind": spec.kind,
        "rows": spec.shape[0],
        "views": spec.shape[1] if len(spec.shape) > 1 else 1,
        "block_rows": spec.block_rows,
        "keys_sha256": spec.keys_sha256,
        "fingerprint": spec.fingerprint,
        "provenance": spec.provenance,
        "versions": {name: version(name) for name in LIBRARIES},
    }
    return common | spec.attributes


def spec_of(path: Path, header: Header | None = None) -> ArraySpec:
    """What an array that is there was to be. Raises UserError for a damaged one, KeyError where it is not of a store."""
    header = header or header_of(path)
    attributes = header.attributes
    own = {key: value for key, value in attributes.items() if key not in COMMON}
    return ArraySpec(
        path,
        attributes["kind"],
        header.shape,
        header.dtype,
        attributes["block_rows"],
        attributes["keys_sha256"],
        attributes["provenance"],
        own,
    )


def _fill(dtype: str) -> float | int:
    return float("nan") if np.dtype(dtype).kind == "f" else -1


def blocks_folder(array: Path) -> Path:
    """The records of an array that is not sealed yet."""
    return array.with_suffix(".blocks")


def record_path(array: Path, block: int) -> Path:
    return blocks_folder(array) / f"{block:06d}.json"


def moments_path(array: Path, block: int) -> Path:
    """Where a block's moments wait for the sealing."""
    return blocks_folder(array) / f"{block:06d}.moments.safetensors"


def written_blocks(array: Path) -> set[int]:
    """The blocks of an unfinished array that have a record."""
    folder = blocks_folder(array)
    if not folder.exists():
        return set()
    names = (path.name for path in folder.iterdir())
    return {int(name.removesuffix(".json")) for name in names if name.endswith(".json") and name[0] != "."}


def write_block(path: Path, block: int, values: np.ndarray) -> None:
    """Write one whole chunk in one assignment, then its record: a block without a record does not exist.

    Raises UserError for NaN or infinite values and for values that the dtype can't hold.
    """
    import zarr

    # Without this zarr would leave out a chunk that holds nothing but fill values.
    with zarr.config.set({"array.write_empty_chunks": True}):
        array = opened(path, mode="r+")
    block_rows = array.chunks[0]
    rows = rows_of(block, block_rows, array.shape[0])
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
    chunk = np.full((block_rows, *array.shape[1:]), _fill(str(array.dtype)), dtype=array.dtype)
    chunk[: len(rows)] = stored
    data = chunk.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    record = {"rows": [rows.start, rows.stop], "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_json(record_path(path, block), record)


def seal(spec: ArraySpec, extra: dict[str, Any] | None = None, run: Run = run_here) -> None:
    """Read every block back, compare it with its record, then write the seal.

    Raises UserError when a block is not what was written; it loses its record, so that the next run does it again.
    """
    records = [read_json(record_path(spec.path, block)) for block in range(spec.blocks)]
    checks = ((spec.path, block, record, len(spec.shape)) for block, record in enumerate(records))
    damaged = {block: found for block, found in enumerate(in_order(run(_damage_of, checks))) if found}
    for block in damaged:
        record_path(spec.path, block).unlink()
    if damaged:
        block, found = next(iter(damaged.items()))
        raise UserError(
            f"{len(damaged)} of {spec.blocks} blocks of {spec.path} are not on the disk as they were written (block {block} "
            f"{found}); run the same command again, they are redone. If it comes again, suspect the disk."
        )
    write_seal(spec, records, extra or {})


def write_seal(spec: ArraySpec, records: list[dict[str, Any]], extra: dict[str, Any]) -> None:
    """The seal over blocks that were checked; it takes the place of the records."""
    metadata = read_json(spec.path / "zarr.json")
    document = {
        "format": FORMAT,
        "kind": spec.kind,
        "rows": spec.shape[0],
        "block_rows": spec.block_rows,
        "keys_sha256": spec.keys_sha256,
        "fingerprint": spec.fingerprint,
        "sha256": digest_of(record["sha256"] for record in records),
        "metadata": metadata,
        "metadata_sha256": fingerprint(metadata),
        **extra,
        "blocks": records,
    }
    write_json(seal_path(spec.path), document)
    if blocks_folder(spec.path).exists():
        remove_folder(blocks_folder(spec.path))


def sealed_metadata(array: Path) -> dict[str, Any] | None:
    """The copy of zarr.json in an array's seal; None where there is no whole one, as in seals of earlier versions."""
    try:
        seal = read_json(seal_path(array))
        return seal["metadata"] if fingerprint(seal["metadata"]) == seal["metadata_sha256"] else None
    except (UserError, OSError, KeyError, TypeError):
        return None


def damage(array: Path, block: int, record: dict[str, Any], dimensions: int) -> str | None:
    """What is wrong with a block's chunk beside its record, in words that follow `block 3 ...`; None when nothing is."""
    try:
        data = chunk_path(array, block, dimensions).read_bytes()
    except FileNotFoundError:
        return "has no chunk"
    if len(data) != record["bytes"]:
        return f"has {len(data)} bytes instead of {record['bytes']}"
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        return "has other bytes than were written (SHA-256)"
    return None


def _damage_of(check: tuple[Path, int, dict[str, Any], int]) -> str | None:
    return damage(*check)


def chunk_path(array: Path, block: int, dimensions: int) -> Path:
    """The file, or object, of a block's chunk."""
    return array.joinpath("c", str(block), *["0"] * (dimensions - 1))


def digest_of(parts: Iterable[str]) -> str:
    """SHA-256 over hexadecimal digests in their order: the digest of a whole array over its blocks'."""
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def open_sealed(path: Path) -> zarr.Array:
    """A finished array for reading. Raises UserError as `sealed_header` does."""
    sealed_header(path)
    return opened(path)


def sealed_header(path: Path) -> Header:
    """Of a finished array. Raises UserError when it is missing, unfinished or damaged (of chunks only sizes are looked at)."""
    if not is_there(path):
        raise UserError(f"There is no store at {path}; `featurize extract` or `featurize levels` makes it.")
    if not is_sealed(path):
        raise UserError(f"The store {path} is unfinished; run the command that was making it again, it goes on.")
    header = header_of(path)
    if header.attributes.get("format") != FORMAT:
        raise UserError(f"{path} is not in the format {FORMAT}; make it again with this version of featurize.")
    sizes = dict(_chunk_sizes(path))
    for block, record in enumerate(read_json(seal_path(path))["blocks"]):
        chunk = chunk_path(path, block, len(header.shape)).relative_to(path).as_posix()
        if sizes.get(chunk, 0) != record["bytes"]:
            raise UserError(
                f"The store {path} is damaged: {chunk} has {sizes.get(chunk, 0)} bytes instead of {record['bytes']}; "
                f"`featurize repair` mends it."
            )
    return header


def _chunk_sizes(path: Path) -> Iterator[tuple[str, int]]:
    """(name below the array, bytes) of each of its files; of a bucket in one listing."""
    if is_local(path):
        yield from (
            (file.relative_to(path).as_posix(), file.stat().st_size) for file in path.rglob("c/**/*") if file.is_file()
        )
        return
    found = path.fs.find(path.path, detail=True)  # type: ignore[attr-defined]
    yield from ((name.partition(f"{path.name}/")[2], int(entry["size"])) for name, entry in found.items())


def read_slice(array: zarr.Array, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop), whole."""
    return np.asarray(array[start:stop])


def read_rows(array: zarr.Array, rows: np.ndarray, view: int | None = None) -> np.ndarray:
    """The given rows (one view, or all), in the order asked for; of a local array only their pages are read."""
    block_rows = array.chunks[0]
    shape = array.shape[1:] if view is None else array.shape[2:]
    values = np.empty((len(rows), *shape), dtype=array.dtype)
    for block in np.unique(rows // block_rows):
        chosen = np.flatnonzero(rows // block_rows == block)
        within = rows[chosen] - int(block) * block_rows
        chunk = _block(array, int(block))
        values[chosen] = chunk[within] if view is None else chunk[within, view]
    return values


def _block(array: zarr.Array, block: int) -> np.ndarray:
    """A block of rows, mapped where it is a file on a local disk (chunks are uncompressed)."""
    from zarr.storage import LocalStore

    if isinstance(array.store, LocalStore):
        chunk = chunk_path(array.store.root / array.path, block, array.ndim)
        return np.asarray(np.memmap(chunk, array.dtype, "r", shape=array.chunks))
    rows = rows_of(block, array.chunks[0], array.shape[0])
    return read_slice(array, rows.start, rows.stop)
