"""A level from the base store: pool, keep the first channels, standardise. No encoder is needed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from featurize.basis.pooling import pool, pooling_matrix
from featurize.basis.svd import load_basis
from featurize.errors import UserError
from featurize.execution.engine import Run, in_order
from featurize.recipe import Shape
from featurize.store.metadata import Header, header_of, is_there
from featurize.store.store import (
    ArraySpec,
    is_sealed,
    opened,
    prepare,
    read_slice,
    rows_of,
    seal,
    sealed_header,
    write_block,
)


@dataclass(frozen=True)
class LevelTask:
    """One block of a level; `level` is None while only its moments are wanted."""

    base: Path
    block: int
    rows: np.ndarray  # (h, H) pooling
    columns: np.ndarray  # (w, W)
    channels: int
    level: Path | None = None
    mean: np.ndarray | None = None
    std: np.ndarray | None = None


@dataclass(frozen=True)
class Sums:
    """Count, mean (C) and sum of squared deviations (C) of some values, float64."""

    count: int
    mean: np.ndarray
    square: np.ndarray


def derive_level(base_path: Path, shape: Shape, standard: Path | None, run: Run) -> Path:
    """Write and seal the level of `shape` beside a sealed base store; its path. A sealed one is left as it is.

    Standardisation: stored = (pooled - mean) / std per channel, over all rows, views and positions of this store, or with
    the mean and std of the same level in the encoder folder `standard` (another split's).
    Raises UserError when the base store is too small for the shape, or a channel is constant.
    """
    base = sealed_header(base_path)
    h, w, channels = shape
    name = f"{h}x{w}x{channels}"
    _check_fits(base, base_path, name, shape)
    rows, columns = pooling_matrix(h, base.shape[2]), pooling_matrix(w, base.shape[3])
    blocks = -(-base.shape[0] // base.chunks[0])
    tasks = [LevelTask(base_path, block, rows, columns, channels) for block in range(blocks)]
    path = base_path.parent / f"{name}.zarr"

    if standard is not None:
        mean, std = _standard_of(standard / f"{name}.zarr", base)
        rule: dict[str, Any] = {"taken": sha256(mean.tobytes() + std.tobytes()).hexdigest()}
    elif "taken" in base.attributes["provenance"]["basis"]:
        raise UserError(
            f"{base_path} has another store's basis, so its levels need that store's standardisation: give --basis."
        )
    else:
        rule = {"fitted_on": "all rows, views and positions"}
    provenance = {
        "base": base.attributes["fingerprint"],
        "shape": list(shape),
        "pooling": "adaptive average",
        "standardisation": rule,
        "dtype": "float16",
    }
    if is_sealed(path) or standard is not None:
        known = (mean, std) if standard is not None else (np.zeros(channels), np.ones(channels))
    else:
        known = _fit_standard(tasks, name, run)
    spec = _level_spec(path, base, shape, rows, columns, provenance, *known)
    todo = prepare(spec)
    writes = [LevelTask(base_path, block, rows, columns, channels, path, *known) for block in todo]
    with tqdm(total=base.shape[0], desc=f"level {name}", unit=" rows", smoothing=0.1, disable=not writes) as progress:
        for _, count in run(write_level_block, writes):
            progress.update(count)
    if not is_sealed(path):
        seal(spec, run=run)
    return path


def _check_fits(base: Header, path: Path, name: str, shape: Shape) -> None:
    _, _, height, width, kept = base.shape
    if shape[0] > height or shape[1] > width:
        raise UserError(f"The level {name} is larger than the {height}x{width} grid of {path}; ask for a smaller one.")
    if shape[2] > kept:
        raise UserError(
            f"The level {name} asks for {shape[2]} channels and {path} keeps {kept}; extract with a larger --base-channels."
        )


def _standard_of(path: Path, base: Header) -> tuple[np.ndarray, np.ndarray]:
    if not is_there(path):
        raise UserError(
            f"The standardisation is to be that of {path}, which is not there; make that level first: "
            f"featurize levels {path.stem} --out {path.parent.parent}."
        )
    attributes = sealed_header(path).attributes
    if attributes["basis_sha256"] != base.attributes["basis_sha256"]:
        raise UserError(
            f"{path} has another basis than the base store it is to standardise; extract with --basis of that store."
        )
    return np.array(attributes["mean"], dtype=np.float64), np.array(attributes["std"], dtype=np.float64)


def sums_of(values: np.ndarray) -> Sums:
    """Sums per channel over everything but the last axis, in float64."""
    flat = values.reshape(-1, values.shape[-1]).astype(np.float64)
    mean = flat.mean(axis=0)
    return Sums(len(flat), mean, ((flat - mean) ** 2).sum(axis=0))


def merge_sums(parts: Iterable[Sums]) -> Sums:
    """The sums of all, merged from the first to the last (Chan et al.): the order is part of the result."""
    count, mean, square = 0, np.zeros(1), np.zeros(1)
    for part in parts:
        delta = part.mean - mean
        square = square + part.square + delta**2 * (count * part.count / (count + part.count))
        mean = mean + delta * (part.count / (count + part.count))
        count += part.count
    return Sums(count, mean, square)


def _fit_standard(tasks: list[LevelTask], name: str, run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std (C), float64, over all blocks."""
    sums = merge_sums(in_order(run(_sums_of_one, tasks)))
    std = np.sqrt(sums.square / sums.count)
    constant = np.flatnonzero(~(std > 1e-6 * std.max(initial=0.0)))
    if constant.size:
        raise UserError(
            f"Channel {constant[0]} of the level {name} is constant over these pictures; ask for fewer channels."
        )
    return sums.mean, std


def _level_spec(
    path: Path,
    base: Header,
    shape: Shape,
    rows: np.ndarray,
    columns: np.ndarray,
    provenance: dict[str, Any],
    mean: np.ndarray,
    std: np.ndarray,
) -> ArraySpec:
    basis = load_basis(path.parent / "basis.safetensors")
    return ArraySpec(
        path=path,
        kind="level",
        shape=(base.shape[0], base.shape[1], *shape),
        dtype="float16",
        block_rows=base.chunks[0],
        keys_sha256=str(base.attributes["keys_sha256"]),
        provenance=provenance,
        attributes={
            "encoder": base.attributes["encoder"],
            "latent_shape": list(shape),
            "basis_sha256": basis.sha256,
            "explained_variance": basis.explained[: shape[2]].tolist(),
            "mean": mean.tolist(),
            "std": std.tolist(),
            "pooling": {"rows": rows.tolist(), "columns": columns.tolist()},
        },
    )


def level_task(path: Path, block: int) -> LevelTask:
    """The task that writes a block of a level as its attributes say, beside its base store."""
    attributes = header_of(path).attributes
    pooling = attributes["pooling"]
    rows, columns = np.array(pooling["rows"]), np.array(pooling["columns"])
    mean, std = np.array(attributes["mean"]), np.array(attributes["std"])
    channels = attributes["latent_shape"][-1]
    return LevelTask(path.parent / "base.zarr", block, rows, columns, channels, path, mean, std)


def pooled_block(task: LevelTask) -> np.ndarray:
    """(rows, views, h, w, C) float32 of one block of the base store."""
    base = opened(task.base)
    rows = rows_of(task.block, base.chunks[0], base.shape[0])
    chunk = read_slice(base, rows.start, rows.stop)[..., : task.channels]
    n, views = chunk.shape[:2]
    pooled = pool(chunk.reshape(n * views, *chunk.shape[2:]), task.rows, task.columns)
    return pooled.reshape(n, views, *pooled.shape[1:])


def _sums_of_one(task: LevelTask) -> Sums:
    return sums_of(pooled_block(task))


def standardised_block(task: LevelTask) -> np.ndarray:
    """The block as it is stored, but for the rounding to float16."""
    assert task.mean is not None and task.std is not None
    return (pooled_block(task) - task.mean) / task.std


def write_level_block(task: LevelTask) -> int:
    """Write the task's block; its number of rows."""
    assert task.level is not None
    values = standardised_block(task)
    write_block(task.level, task.block, values)
    return len(values)
