"""Do again exactly what `verify` finds: blocks from the pictures or the base store, records and seals from the blocks."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from featurize.engine import Run
from featurize.errors import UserError
from featurize.extract import check_tolerance, measure_basis
from featurize.files import read_json, write_json
from featurize.header import header_of, is_there
from featurize.ledger import Ledger, ledger_path, read_ledger
from featurize.levels import level_task, write_level_block
from featurize.recipe import Features
from featurize.store import (
    ArraySpec,
    blocks_folder,
    chunk_path,
    is_sealed,
    prepare,
    record_path,
    rows_of,
    seal,
    seal_path,
    spec_of,
    write_block,
)
from featurize.verify import Finding, arrays_of, verify
from featurize.work import BlockTask, batch_of, encoder_spec, write_one

MENDABLE = ("base", "level", "z0", "labels")


def repair(root: Path, run: Run, say: Callable[[str], None]) -> list[Finding]:
    """Mend what `verify` finds; what is left is returned, with what to do about it.

    A sealed array is unsealed while it is being mended. Raises UserError when a block that is made again is not the block that
    was sealed: other libraries or another processor round otherwise.
    """
    findings = verify(root, run)
    if any(finding.where == ledger_path(root) for finding in findings):
        return findings
    bad: dict[Path, set[int]] = defaultdict(set)
    for finding in findings:
        bad[finding.where] |= {finding.block} if finding.block is not None else set()
    ledger = read_ledger(root)
    for path in arrays_of(root):  # base stores before their levels
        if path in bad and is_there(path) and spec_of(path).kind in MENDABLE:
            say(f"mending {path}: {len(bad[path])} blocks")
            _mend(path, bad[path], ledger, run)
    return verify(root, run) if findings else []


def _mend(path: Path, bad: set[int], ledger: Ledger, run: Run) -> None:
    spec = spec_of(path)
    sealed = _unseal(spec, bad)
    todo = prepare(spec)
    if spec.kind == "labels":
        for block in todo:
            rows = rows_of(block, spec.block_rows, ledger.rows)
            write_block(path, block, ledger.labels[rows.start : rows.stop])
    elif spec.kind == "level":
        list(run(write_level_block, [level_task(path, block) for block in todo]))
    else:
        list(run(write_one, (_picture_task(spec, block, ledger) for block in todo)))
    for block in todo:
        was, now = sealed.get(block), read_json(record_path(path, block))
        if was is not None and was != now:
            versions = spec_versions(path)
            raise UserError(
                f"Block {block} of {path}, made again, is not the block that was sealed (it was made with {versions}); it is "
                "written and the array unsealed. Bring those versions back and repair again, or repair again to seal it as it is."
            )
    extra: dict[str, Any] = {}
    if spec.kind == "base":
        basis = path.parent / "basis.safetensors"
        extra = measure_basis(path, spec.blocks, basis, spec.shape[-1])
        if "taken" not in spec.provenance["basis"]:
            check_tolerance(extra, spec, spec.attributes["options"]["basis_tolerance"])
    seal(spec, extra, run)


def spec_versions(path: Path) -> str:
    """The libraries an array was made with, in words."""
    versions = header_of(path).attributes["versions"]
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _unseal(spec: ArraySpec, bad: set[int]) -> dict[int, dict[str, Any]]:
    """Make an array an unfinished one that lacks its bad blocks; the records that its seal had.

    Where neither seal nor records are left, blocks that look whole get a record of what they hold.
    """
    records: dict[int, dict[str, Any]] = {}
    if is_sealed(spec.path):
        try:
            records = dict(enumerate(read_json(seal_path(spec.path))["blocks"]))
        except (UserError, KeyError):
            records = {}
        if len(records) != spec.blocks:
            records = {}
        if blocks_folder(spec.path).exists():
            for leftover in blocks_folder(spec.path).glob("*.json"):
                leftover.unlink()
        kept = records
    elif blocks_folder(spec.path).exists():
        for block in bad:
            record_path(spec.path, block).unlink(missing_ok=True)
        return {}
    else:
        kept = {}
    if not kept and spec.kind != "level":  # a level is made again sooner than it is trusted
        kept = {block: record for block in range(spec.blocks) if (record := _record_of(spec, block)) is not None}
    for block, record in kept.items():
        if block not in bad:
            write_json(record_path(spec.path, block), record)
    seal_path(spec.path).unlink(missing_ok=True)
    return records


def _record_of(spec: ArraySpec, block: int) -> dict[str, Any] | None:
    """A record of a chunk as it lies there; None for one that can't be whole."""
    chunk = chunk_path(spec.path, block, len(spec.shape))
    size = int(np.prod((spec.block_rows, *spec.shape[1:]))) * np.dtype(spec.dtype).itemsize
    data = chunk.read_bytes() if chunk.is_file() else b""
    rows = rows_of(block, spec.block_rows, spec.shape[0])
    if len(data) != size:
        return None
    values = np.frombuffer(data, np.dtype(spec.dtype).newbyteorder("<")).reshape(spec.block_rows, -1)[: len(rows)]
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        return None
    return {"rows": [rows.start, rows.stop], "bytes": size, "sha256": hashlib.sha256(data).hexdigest()}


def _picture_task(spec: ArraySpec, block: int, ledger: Ledger) -> BlockTask:
    """The task that writes a block of a base store or of `z_0` from the pictures, with the options it was made with."""
    features = features_of(spec)
    rows = rows_of(block, spec.block_rows, spec.shape[0])
    base = spec.path if spec.kind == "base" else None
    return BlockTask(
        block,
        batch_of(ledger, rows, features),
        base,
        spec.path.parent / "basis.safetensors",
        spec.shape[-1],
        None if base else spec.path,
    )


def features_of(spec: ArraySpec) -> Features:
    """The options that a base store or `z_0` was made with. Raises UserError when the encoder is another now."""
    from featurize.encoders import load_encoder

    features = Features(out="", **spec.attributes["options"])
    if spec.kind == "base":
        identity: dict[str, Any] = load_encoder(encoder_spec(features), "cpu").identity
        made_with = spec.provenance["encoder"]
        changed = [key for key in sorted(made_with) if _plain(identity.get(key)) != made_with[key]]
        if changed:
            raise UserError(
                f"{spec.path} was made with another {features.encoder} (differs in: {', '.join(changed)}); bring those weights "
                f"back to {features.weights or 'their place'} to make blocks again."
            )
    return features


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
