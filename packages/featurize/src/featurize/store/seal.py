"""The seal of a whole array: every block is read back and compared with its record first."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np

from featurize.errors import UserError
from featurize.io.files import is_local, json_sha256, read_json, remove_folder, to_disk, write_json
from featurize.store.layout import (
    blocks_folder,
    chunk_path,
    is_sealed,
    metadata_copy_path,
    metadata_path,
    record_path,
    seal_path,
)
from featurize.store.metadata import FORMAT, ArraySpec, fingerprint, metadata_copy

T = TypeVar("T")

OWN_DIGEST = "seal_sha256"  # of everything else that a seal says
KEYS = {
    "format", "kind", "rows", "block_rows", "keys_sha256", "fingerprint", "sha256", "metadata", "metadata_sha256",
    "basis_drift", "features", "blocks", OWN_DIGEST,
}  # fmt: skip

Record: TypeAlias = dict[str, Any]  # rows, bytes and sha256 of a block
Map: TypeAlias = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]  # as Python's own `map`


def seal(
    spec: ArraySpec,
    extra: dict[str, Any] | None = None,
    ordered_map: Map = map,
    gather: Callable[[np.ndarray], T] | None = None,
) -> list[T]:
    """Read every block back, compare it with its record, then write the seal, with `extra` keys.

    `ordered_map` spreads the reading over workers. What `gather` makes of each block's rows is returned: they are in memory
    now. Raises UserError when a block is not what was written; it loses its record, so that the next run writes it again.
    """
    records = [read_record(spec, block) for block in range(spec.blocks)]
    checks = ((spec, block, record, gather) for block, record in enumerate(records))
    problems, gathered = zip(*ordered_map(_checked_and_on_disk, checks), strict=True)
    damaged = {block: problem for block, problem in enumerate(problems) if problem}
    for block in damaged:
        record_path(spec.path, block).unlink(missing_ok=True)
    if damaged:
        block, problem = next(iter(damaged.items()))
        raise UserError(
            f"{len(damaged)} of {spec.blocks} blocks of {spec.path} are not on the disk as they were written (block {block} "
            f"{problem}); run the same command again, they are redone. If it comes again, suspect the disk."
        )
    if is_local(spec.path):
        for folder in (spec.path / "c", spec.path):
            to_disk(folder)
    metadata = read_json(metadata_path(spec.path))
    document = {
        "format": FORMAT,
        "kind": spec.kind,
        "rows": spec.rows,
        "block_rows": spec.rows_per_block,
        "keys_sha256": spec.keys_sha256,
        "fingerprint": spec.fingerprint,
        "sha256": array_sha256(record for record in records if record is not None),
        "metadata": metadata,
        "metadata_sha256": fingerprint(metadata),
        **(extra or {}),
        "blocks": records,
    }
    write_json(seal_path(spec.path), document | {OWN_DIGEST: json_sha256(document)})
    if blocks_folder(spec.path).exists():
        remove_folder(blocks_folder(spec.path))
    return [] if gather is None else list(gathered)


def read_seal(array: Path) -> dict[str, Any]:
    """The seal of an array. Raises UserError for a damaged one, OSError where there is none."""
    document = read_json(seal_path(array))
    known = isinstance(document, dict) and document.keys() <= KEYS
    digest = document.pop(OWN_DIGEST, None) if known else None
    if not known or digest not in (None, json_sha256(document)):
        raise UserError(f"The seal {seal_path(array)} is damaged; run `featurize repair` to fix it.")
    return document


def read_record(spec: ArraySpec, block: int) -> Record | None:
    """The record of a block; None where there is none, or a damaged one."""
    try:
        record = read_json(record_path(spec.path, block))
    except (UserError, OSError):
        return None
    return record if is_record(record, spec, block) else None


def is_record(record: Any, spec: ArraySpec, block: int) -> bool:
    """Whether this can be the record of a block: its rows, its bytes and a digest."""
    rows = spec.rows_of(block)
    digest = record.get("sha256") if isinstance(record, dict) else None
    return isinstance(digest, str) and record == {
        "rows": [rows.start, rows.stop],
        "bytes": spec.bytes_per_block,
        "sha256": digest,
    }


def unseal(spec: ArraySpec, bad: set[int]) -> dict[int, Record]:
    """Make an array an unfinished one that lacks its bad blocks; the records that its seal had, by block.

    A block stays written only where the seal or a record vouches for it. The records returned are those of a seal that agrees
    with its own digest; a damaged seal gives none.
    """
    if not is_sealed(spec.path):
        for block in bad:
            record_path(spec.path, block).unlink(missing_ok=True)
        return {}
    try:
        document = read_json(seal_path(spec.path))
        records, digest = list(document["blocks"]), document["sha256"]
        is_whole = array_sha256(records) == digest
    except (UserError, KeyError, TypeError):
        records, is_whole = [], False
    if len(records) != spec.blocks:  # only records that a killed run left beside the seal can vouch for a block
        records, is_whole = [], False
    for block, record in enumerate(records):
        write_json(record_path(spec.path, block), record, wait_for_name=False)
    copy_metadata(spec.path)
    for block in bad:
        record_path(spec.path, block).unlink(missing_ok=True)
    if is_local(spec.path) and blocks_folder(spec.path).exists():
        to_disk(blocks_folder(spec.path))
    seal_path(spec.path).unlink()
    return dict(enumerate(records)) if is_whole else {}


def copy_metadata(array: Path, document: dict[str, Any] | None = None) -> None:
    """Write the copy of zarr.json that lies among the records of an unfinished array: `document`, or the seal's copy."""
    document = metadata_copy(array) if document is None else document
    if document is not None:
        write_json(metadata_copy_path(array), {"metadata": document, "metadata_sha256": json_sha256(document)})


def chunk_problem(array: Path, block: int, record: Record | None, dimensions: int) -> str | None:
    """What is wrong with a block's chunk compared with its record, in words that follow `block 3 ...`; None when nothing is."""
    return _read_chunk(array, block, record, dimensions)[0]


def _read_chunk(array: Path, block: int, record: Record | None, dimensions: int) -> tuple[str | None, bytes]:
    """`chunk_problem`, and the chunk where it has none."""
    if record is None:
        return "has no record, or a damaged one", b""
    try:
        data = chunk_path(array, block, dimensions).read_bytes()
    except FileNotFoundError:
        return "has no chunk", b""
    if len(data) != record["bytes"]:
        return f"has {len(data)} bytes instead of {record['bytes']}", b""
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        return "has other bytes than were written (SHA-256)", b""
    return None, data


def _checked_and_on_disk(
    check: tuple[ArraySpec, int, Record | None, Callable[[np.ndarray], T] | None],
) -> tuple[str | None, T | None]:
    """`chunk_problem`, and what is gathered of a chunk that is whole, which keeps its name after a power cut."""
    spec, block, record, gather = check
    dimensions = len(spec.shape)
    problem, data = _read_chunk(spec.path, block, record, dimensions)
    if problem is not None:
        return problem, None
    if is_local(spec.path):
        for folder in chunk_path(spec.path, block, dimensions).parents[: dimensions - 1]:
            to_disk(folder)
    if gather is None:
        return None, None
    rows = np.frombuffer(data, np.dtype(spec.dtype).newbyteorder("<")).reshape(-1, *spec.shape[1:])
    return None, gather(rows[: len(spec.rows_of(block))])


def array_sha256(records: Iterable[Record]) -> str:
    """SHA-256 over the hexadecimal digests of the blocks, in order: the digest of a whole array."""
    return hashlib.sha256("".join(record["sha256"] for record in records).encode()).hexdigest()
