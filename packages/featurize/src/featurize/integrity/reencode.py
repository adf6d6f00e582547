"""Random rows encoded again from their pictures, against what the store holds: the check that trusts nothing on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from featurize.errors import UserError
from featurize.execution.engine import Run
from featurize.extraction.block import BlockTask, Clock, batch_of, encode_batch
from featurize.integrity.repair_files import features_of
from featurize.integrity.verify import Finding, arrays_of
from featurize.store.ledger import Ledger, read_ledger
from featurize.store.store import ArraySpec, is_sealed, opened, read_rows, spec_of

# Relative distance of a row from its second encoding: float16's rounding is 3e-4, bfloat16's 8e-3 and differs by processor.
TOLERANCE = {"float32": 5e-3, "bfloat16": 5e-2}
PER_TASK = 32  # rows


def spot_check(root: Path, count: int, seed: int, run: Run) -> list[Finding]:
    """Encode `count` random rows again and compare them with every sealed base store and `z_0` of a root."""
    ledger = read_ledger(root)
    rows = sorted(np.random.default_rng(seed).choice(ledger.rows, min(count, ledger.rows), replace=False).tolist())
    findings: list[Finding] = []
    for path in arrays_of(root):
        if is_sealed(path) and (spec := spec_of(path)).kind in ("base", "z0"):
            findings += _check(spec, ledger, rows, run)
    return findings


def _check(spec: ArraySpec, ledger: Ledger, rows: list[int], run: Run) -> Iterator[Finding]:
    try:
        features = features_of(spec)
        base = spec.path if spec.kind == "base" else None
        parts = [rows[start : start + PER_TASK] for start in range(0, len(rows), PER_TASK)]
        first = BlockTask(
            0,
            batch_of(ledger, parts[0], features),
            base,
            spec.path.parent / "basis.safetensors",
            spec.shape[-1],
            None if base else spec.path,
        )
        tasks = ((replace(first, batch=batch_of(ledger, part, features)), part) for part in parts)
        found = dict(run(_distances, tasks))
    except UserError as error:
        yield Finding(spec.path, f"can't be encoded again: {error}")
        return
    limit = TOLERANCE[features.precision]
    for index, distances in sorted(found.items()):
        for row, distance in zip(parts[index], distances):
            if not distance <= limit:
                yield Finding(
                    spec.path,
                    f"row {row} ({ledger.keys[row]}), encoded again, is {distance:.1%} away from what is stored",
                    row // spec.block_rows,
                )


def _distances(task: tuple[BlockTask, list[int]]) -> list[float]:
    block, rows = task
    found = encode_batch(block, Clock())
    again = found.base if block.base is not None else found.z0
    path = block.base if block.base is not None else block.z0
    assert again is not None and path is not None
    stored = read_rows(opened(path), np.array(rows)).astype(np.float64).reshape(len(rows), -1)
    again = again.reshape(len(rows), -1)
    return (np.linalg.norm(again - stored, axis=1) / np.maximum(np.linalg.norm(stored, axis=1), 1e-12)).tolist()
