"""The seal of a whole array: every block is read back and compared with its record first."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

from featurize.errors import UserError
from featurize.io.files import read_json, remove_folder, write_json
from featurize.store.layout import blocks_folder, chunk_path, is_sealed, metadata_path, record_path, seal_path
from featurize.store.metadata import FORMAT, ArraySpec, fingerprint

Record: TypeAlias = dict[str, Any]  # rows, bytes and sha256 of a block
Map: TypeAlias = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]  # as Python's own `map`


def seal(spec: ArraySpec, extra: dict[str, Any] | None = None, ordered_map: Map = map) -> None:
    """Read every block back, compare it with its record, then write the seal, with `extra` keys.

    `ordered_map` spreads the reading over workers. Raises UserError when a block is not what was written; it loses its
    record, so that the next run writes it again.
    """
    records = [read_json(record_path(spec.path, block)) for block in range(spec.blocks)]
    checks = ((spec.path, block, record, len(spec.shape)) for block, record in enumerate(records))
    damaged = {block: problem for block, problem in enumerate(ordered_map(_chunk_problem, checks)) if problem}
    for block in damaged:
        record_path(spec.path, block).unlink()
    if damaged:
        block, problem = next(iter(damaged.items()))
        raise UserError(
            f"{len(damaged)} of {spec.blocks} blocks of {spec.path} are not on the disk as they were written (block {block} "
            f"{problem}); run the same command again, they are redone. If it comes again, suspect the disk."
        )
    metadata = read_json(metadata_path(spec.path))
    document = {
        "format": FORMAT,
        "kind": spec.kind,
        "rows": spec.rows,
        "block_rows": spec.rows_per_block,
        "keys_sha256": spec.keys_sha256,
        "fingerprint": spec.fingerprint,
        "sha256": array_sha256(records),
        "metadata": metadata,
        "metadata_sha256": fingerprint(metadata),
        **(extra or {}),
        "blocks": records,
    }
    write_json(seal_path(spec.path), document)
    if blocks_folder(spec.path).exists():
        remove_folder(blocks_folder(spec.path))


def read_seal(array: Path) -> dict[str, Any]:
    """The seal of an array. Raises UserError for a damaged one, OSError where there is none."""
    return read_json(seal_path(array))


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
        document = read_seal(spec.path)
        records, digest = list(document["blocks"]), document["sha256"]
        is_whole = array_sha256(records) == digest
    except (UserError, KeyError, TypeError):
        records, is_whole = [], False
    if len(records) == spec.blocks:
        for block, record in enumerate(records):
            write_json(record_path(spec.path, block), record)
    else:  # only records that a killed run left beside the seal can vouch for a block
        is_whole = False
    for block in bad:
        record_path(spec.path, block).unlink(missing_ok=True)
    seal_path(spec.path).unlink()
    return dict(enumerate(records)) if is_whole else {}


def chunk_problem(array: Path, block: int, record: Record, dimensions: int) -> str | None:
    """What is wrong with a block's chunk compared with its record, in words that follow `block 3 ...`; None when nothing is."""
    try:
        data = chunk_path(array, block, dimensions).read_bytes()
    except FileNotFoundError:
        return "has no chunk"
    if len(data) != record["bytes"]:
        return f"has {len(data)} bytes instead of {record['bytes']}"
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        return "has other bytes than were written (SHA-256)"
    return None


def _chunk_problem(check: tuple[Path, int, Record, int]) -> str | None:
    return chunk_problem(*check)


def array_sha256(records: Iterable[Record]) -> str:
    """SHA-256 over the hexadecimal digests of the blocks, in order: the digest of a whole array."""
    return hashlib.sha256("".join(record["sha256"] for record in records).encode()).hexdigest()
