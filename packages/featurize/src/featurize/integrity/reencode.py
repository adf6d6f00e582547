"""Random rows encoded again from their images, against what the store holds: the check that trusts nothing on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from featurize.errors import UserError
from featurize.execution.precision import AGREEMENT
from featurize.execution.tasks import Run
from featurize.extraction.block import BlockTask, encode_batch
from featurize.extraction.loader import Clock, batch_of
from featurize.integrity.options import features_of
from featurize.integrity.verify import Finding
from featurize.store.layout import is_sealed, list_arrays
from featurize.store.ledger import Ledger, read_ledger
from featurize.store.metadata import ArraySpec, spec_of
from featurize.store.read import open_array, read_rows

ROWS_PER_TASK = 32


def spot_check(root: Path, count: int, seed: int, run: Run) -> list[Finding]:
    """Encode `count` random rows again and compare them with every sealed base store and `z_0` of a root."""
    ledger = read_ledger(root)
    rows = sorted(np.random.default_rng(seed).choice(ledger.rows, min(count, ledger.rows), replace=False).tolist())
    findings: list[Finding] = []
    for path in list_arrays(root):
        if is_sealed(path) and (spec := spec_of(path)).kind in ("base", "z0"):
            findings += _check(spec, ledger, rows, run)
    return findings


def _check(spec: ArraySpec, ledger: Ledger, rows: list[int], run: Run) -> Iterator[Finding]:
    parts = [rows[start : start + ROWS_PER_TASK] for start in range(0, len(rows), ROWS_PER_TASK)]
    is_base = spec.kind == "base"
    try:
        features = features_of(spec)
        tasks = (
            (
                BlockTask(0, batch_of(ledger, part, features), spec if is_base else None, None if is_base else spec),
                part,
            )
            for part in parts
        )
        distances = dict(run(_distances, tasks))
    except UserError as error:
        yield Finding(spec.path, f"can't be encoded again: {error}")
        return
    limit = AGREEMENT[features.precision if is_base else features.z0_precision]
    for index in sorted(distances):
        for row, distance in zip(parts[index], distances[index]):
            if not distance <= limit:
                yield Finding(
                    spec.path,
                    f"row {row} ({ledger.keys[row]}), encoded again, is {distance:.1%} away from what is stored",
                    row // spec.rows_per_block,
                )


def _distances(task: tuple[BlockTask, list[int]]) -> list[float]:
    """For each row |again - stored| / |stored|."""
    block, rows = task
    encoded = encode_batch(block, Clock())
    again, spec = (encoded.base, block.base) if block.base is not None else (encoded.z0, block.z0)
    assert again is not None and spec is not None
    stored = read_rows(open_array(spec.path), np.array(rows)).astype(np.float64).reshape(len(rows), -1)
    again = again.reshape(len(rows), -1)
    return (np.linalg.norm(again - stored, axis=1) / np.maximum(np.linalg.norm(stored, axis=1), 1e-12)).tolist()
