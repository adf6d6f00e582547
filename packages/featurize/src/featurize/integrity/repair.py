"""Do again exactly what `verify` finds: first the files beside the blocks, then blocks from the pictures, the captions or the
base store, and records and seals from the blocks."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from featurize.errors import UserError
from featurize.execution.engine import Run
from featurize.extraction.block import BlockTask, batch_of, write_one
from featurize.extraction.extract import check_tolerance, measure_basis
from featurize.extraction.levels import level_task, write_level_block
from featurize.integrity import repair_files as mend_files
from featurize.integrity.repair_files import features_of, spec_or_none
from featurize.integrity.verify import Finding, arrays_of, check_root, has_moments, verify
from featurize.io.files import read_json, write_json
from featurize.store.ledger import Ledger, read_ledger
from featurize.store.metadata import header_of
from featurize.store.store import (
    ArraySpec,
    blocks_folder,
    chunk_path,
    is_sealed,
    prepare,
    record_path,
    rows_of,
    seal,
    seal_path,
    write_block,
)

KINDS = ("base", "level", "z0", "labels", "text", "offsets")


def repair(root: Path, run: Run, say: Callable[[str], None]) -> list[Finding]:
    """Mend what `verify` finds; what is left is returned, with what to do about it.

    A sealed array is unsealed while it is being mended. Raises UserError when a block that is made again is not the block that
    was sealed: other libraries or another processor round otherwise.
    """
    check_root(root)
    mend_files.mend_headers(root, say)
    mend_files.mend_ledger(root, run, say)
    ledger = read_ledger(root)
    mend_files.mend_bases(root, ledger, run, say)
    findings = verify(root, run)
    bad: dict[Path, set[int]] = defaultdict(set)
    for finding in findings:
        bad[finding.where] |= {finding.block} if finding.block is not None else set()
    for path in arrays_of(root):  # base stores before their levels
        if path in bad and (spec := spec_or_none(path)) is not None and spec.kind in KINDS:
            say(f"mending {path}: {len(bad[path])} blocks")
            _mend(spec, bad[path], ledger, run)
    return verify(root, run) if findings else []


def _mend(spec: ArraySpec, bad: set[int], ledger: Ledger, run: Run) -> None:
    path = spec.path
    measured = _measured_before(spec)
    if _are_moments_lost(spec, measured):
        # They are sums over the features of all pictures, which are not kept.
        bad, measured = set(range(spec.blocks)), {}
    sealed = _unseal(spec, bad)
    todo = prepare(spec)
    if spec.kind in ("labels", "offsets"):
        values = ledger.labels if spec.kind == "labels" else _captions(ledger)[1]
        for block in todo:
            rows = rows_of(block, spec.block_rows, spec.shape[0])
            write_block(path, block, values[rows.start : rows.stop])
    elif spec.kind == "level":
        list(run(write_level_block, [level_task(path, block) for block in todo]))
    elif spec.kind == "text":
        _embed_again(spec, todo, ledger, run)
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
    extra = measured
    if spec.kind == "base" and not measured:
        basis = path.parent / "basis.safetensors"
        extra = measure_basis(path, spec.blocks, basis, spec.shape[-1])
        if "taken" not in spec.provenance["basis"]:
            check_tolerance(extra, spec, spec.attributes["options"]["basis_tolerance"])
    seal(spec, extra, run)


def _measured_before(spec: ArraySpec) -> dict[str, Any]:
    """What the seal of a base store says of its basis: the same values give the same again."""
    try:
        seal = read_json(seal_path(spec.path))
        return {name: seal[name] for name in ("basis_drift", "features")} if spec.kind == "base" else {}
    except (UserError, OSError, KeyError):
        return {}


def _are_moments_lost(spec: ArraySpec, measured: dict[str, Any]) -> bool:
    """Whether the moments of a base store are damaged, or are not there and would be needed to seal it."""
    if spec.kind != "base" or (not is_sealed(spec.path) and blocks_folder(spec.path).exists()):
        return False
    kept = spec.path.parent / "moments.safetensors"
    return not has_moments(kept) if kept.is_file() else not measured


def _captions(ledger: Ledger) -> tuple[list[str], np.ndarray]:
    from featurize.text.clip_text import captions_of  # imports torch

    return captions_of(ledger)


def _embed_again(spec: ArraySpec, blocks: list[int], ledger: Ledger, run: Run) -> None:
    """Write blocks of embedded captions. Raises UserError when the text encoder is another now."""
    from featurize.text.clip_text import TextSpec, text_card, text_tasks, write_text_block

    asked = mend_files.asked_for(spec.path.parent.parent)
    known = {
        "text": "clip",
        "text_weights": None if asked is None else asked.text_weights,
    }  # of earlier versions' arrays
    options = spec.attributes.get("options", known)
    encoder = TextSpec(options["text"], options["text_weights"])
    if json.loads(json.dumps(text_card(encoder).identity)) != spec.provenance["encoder"]:
        raise UserError(
            f"{spec.path} was made with another text encoder; bring those weights back to "
            f"{encoder.weights or 'their place'} to embed captions again."
        )
    list(run(write_text_block, text_tasks(spec.path, ["", *_captions(ledger)[0]], blocks, encoder)))


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
