"""A level from the base store: pool, keep the first channels, standardise. No encoder is needed."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from featurize.basis.pooling import pool, pooling_matrix
from featurize.basis.standardise import Sums, check_varies, merge_sums, sums_of
from featurize.basis.svd import load_basis
from featurize.errors import UserError
from featurize.execution.tasks import Run, in_order, ordered_map
from featurize.recipe import Shape
from featurize.store.layout import base_path, basis_path, has_metadata, is_sealed, level_path, root_of, shape_name
from featurize.store.metadata import ArrayMetadata, ArraySpec, read_metadata
from featurize.store.read import open_array, read_block, read_sealed_metadata
from featurize.store.seal import seal
from featurize.store.write import prepare, write_block


@dataclass(frozen=True)
class Pooling:
    """How a block of the base store becomes a map of a level: two pooling matrices (h, H), (w, W), and its first channels."""

    rows: np.ndarray
    columns: np.ndarray
    channels: int


@dataclass(frozen=True)
class PoolTask:
    """One block of a base store to pool."""

    base: Path
    block: int
    pooling: Pooling


@dataclass(frozen=True)
class LevelTask:
    """One block of a level: pooled, then standardised with mean (C) and std (C)."""

    path: Path
    pool: PoolTask
    mean: np.ndarray
    std: np.ndarray


def derive_level(base: Path, shape: Shape, standard: Path | None, run: Run) -> Path:
    """Write and seal the level of `shape` beside a sealed base store; its path. A sealed one is left as it is.

    Standardisation: stored = (pooled - mean) / std per channel, over all rows, views and positions of this store, or with
    the mean and std of the same level in the encoder folder `standard` (another split's).
    Raises UserError when the base store is too small for the shape, or a channel is constant.
    """
    spec = level_spec(base, shape, standard, run)
    write_level(spec, run)
    if not is_sealed(spec.path):
        seal(spec, ordered_map=ordered_map(run))
    return spec.path


def level_spec(base: Path, shape: Shape, standard: Path | None, run: Run) -> ArraySpec:
    """What the level of `shape` beside a base store is to be; mean and std are measured unless they are taken or stored."""
    metadata = read_sealed_metadata(base)
    name = shape_name(shape)
    _check_fits(metadata, base, shape)
    path = level_path(base.parent, shape)
    pooling = Pooling(
        pooling_matrix(shape[0], metadata.shape[2]), pooling_matrix(shape[1], metadata.shape[3]), shape[2]
    )
    rule: dict[str, Any] = {"fitted_on": "all rows, views and positions"}
    if standard is not None:
        mean, std = _standard_of(level_path(standard, shape), metadata)
        rule = {"taken": sha256(mean.tobytes() + std.tobytes()).hexdigest()}
    elif "taken" in metadata.attributes["provenance"]["basis"]:
        raise UserError(
            f"{base} has another store's basis, so its levels need that store's standardisation: give --basis."
        )
    elif is_sealed(path):
        stored = read_metadata(path).attributes
        mean, std = np.array(stored["mean"]), np.array(stored["std"])
    else:
        blocks = -(-metadata.shape[0] // metadata.chunks[0])
        sums = merge_sums(in_order(run(_sums_of_block, (PoolTask(base, block, pooling) for block in range(blocks)))))
        mean, std = sums.mean, sums.std
        check_varies(std, name)
    basis = load_basis(basis_path(base.parent))
    return ArraySpec(
        path=path,
        kind="level",
        shape=(metadata.shape[0], metadata.shape[1], *shape),
        dtype="float16",
        rows_per_block=metadata.chunks[0],
        keys_sha256=str(metadata.attributes["keys_sha256"]),
        provenance={
            "base": metadata.attributes["fingerprint"],
            "shape": list(shape),
            "pooling": "adaptive average",
            "standardisation": rule,
            "dtype": "float16",
        },
        attributes={
            "encoder": metadata.attributes["encoder"],
            "latent_shape": list(shape),
            "basis_sha256": basis.sha256,
            "explained_variance": basis.explained[: shape[2]].tolist(),
            "mean": mean.tolist(),
            "std": std.tolist(),
            "pooling": {"rows": pooling.rows.tolist(), "columns": pooling.columns.tolist()},
        },
    )


def write_level(spec: ArraySpec, run: Run) -> None:
    """Write the blocks that a level lacks, from the base store beside it."""
    tasks = [level_task(spec, block) for block in prepare(spec)]
    description = f"level {spec.path.stem}"
    with tqdm(total=spec.rows, desc=description, unit=" rows", smoothing=0.1, disable=not tasks) as progress:
        for _, rows in run(_write_level_block, tasks):
            progress.update(rows)


def level_task(spec: ArraySpec, block: int) -> LevelTask:
    """The task that writes a block of a level as its attributes say."""
    attributes = spec.attributes
    pooling = Pooling(
        np.array(attributes["pooling"]["rows"]), np.array(attributes["pooling"]["columns"]), spec.shape[-1]
    )
    return LevelTask(
        spec.path,
        PoolTask(base_path(spec.path.parent), block, pooling),
        np.array(attributes["mean"]),
        np.array(attributes["std"]),
    )


def _check_fits(base: ArrayMetadata, path: Path, shape: Shape) -> None:
    _, _, height, width, channels = base.shape
    name = shape_name(shape)
    if shape[0] > height or shape[1] > width:
        raise UserError(f"The level {name} is larger than the {height}x{width} grid of {path}; ask for a smaller one.")
    if shape[2] > channels:
        raise UserError(
            f"The level {name} asks for {shape[2]} channels and {path} keeps {channels}; extract with a larger --base-channels."
        )


def _standard_of(path: Path, base: ArrayMetadata) -> tuple[np.ndarray, np.ndarray]:
    """Mean (C) and std (C), float64, of another split's level."""
    if not has_metadata(path):
        raise UserError(
            f"The standardisation is to be that of {path}, which is not there; make that level first: "
            f"featurize levels {path.stem} --out {root_of(path)}."
        )
    attributes = read_sealed_metadata(path).attributes
    if attributes["basis_sha256"] != base.attributes["basis_sha256"]:
        raise UserError(
            f"{path} has another basis than the base store it is to standardise; extract with --basis of that store."
        )
    return np.array(attributes["mean"], dtype=np.float64), np.array(attributes["std"], dtype=np.float64)


def pooled_block(task: PoolTask) -> np.ndarray:
    """(rows, views, h, w, C) float32 of one block of the base store."""
    chunk = read_block(open_array(task.base), task.block)[..., : task.pooling.channels]
    rows, views = chunk.shape[:2]
    pooled = pool(chunk.reshape(rows * views, *chunk.shape[2:]), task.pooling.rows, task.pooling.columns)
    return pooled.reshape(rows, views, *pooled.shape[1:])


def standardised_block(task: LevelTask) -> np.ndarray:
    """The block as it is stored, but for the rounding to float16."""
    return (pooled_block(task.pool) - task.mean) / task.std


def _sums_of_block(task: PoolTask) -> Sums:
    return sums_of(pooled_block(task))


def _write_level_block(task: LevelTask) -> int:
    """Write the task's block; its number of rows."""
    values = standardised_block(task)
    write_block(task.path, task.pool.block, values)
    return len(values)
