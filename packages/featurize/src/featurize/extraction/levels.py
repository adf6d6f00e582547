"""Levels from the base store: pool, keep the first channels, standardise. No encoder is needed.

A block of the base store is read once for its sums, and once for all levels that are written of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from shlex import quote
from typing import Any, TypeAlias

import numpy as np
from tqdm import tqdm

from featurize.basis.pooling import pool, pooling_matrix
from featurize.basis.standardise import Sums, check_varies, merge_sums, sums_of
from featurize.basis.svd import load_basis
from featurize.errors import UserError
from featurize.execution.tasks import Run, in_order, ordered_map
from featurize.recipe import Shape
from featurize.store.layout import base_path, basis_path, has_metadata, is_sealed, level_path, root_of, shape_name
from featurize.store.metadata import ArrayMetadata, ArraySpec, existing_metadata, read_metadata
from featurize.store.read import open_array, read_block, read_sealed_metadata
from featurize.store.seal import seal
from featurize.store.write import prepare, write_block

BlockSums: TypeAlias = tuple[Sums, ...]  # of one block, one a level


@dataclass(frozen=True)
class Pooling:
    """How a block of the base store becomes a map of a level: two pooling matrices (h, H), (w, W), and its first channels."""

    rows: np.ndarray
    columns: np.ndarray
    channels: int


@dataclass(frozen=True)
class LevelTask:
    """One block of a level: a block of the base store pooled, then standardised with mean (C) and std (C)."""

    spec: ArraySpec
    base: Path
    block: int
    pooling: Pooling
    mean: np.ndarray
    std: np.ndarray


def derive_levels(
    base: Path, shapes: Sequence[Shape], standard: Path | None, run: Run, sums: Sequence[BlockSums] | None = None
) -> list[Path]:
    """Write and seal the levels of `shapes` beside a sealed base store; their paths. Sealed ones are left as they are.

    Standardisation: stored = (pooled - mean) / std per channel, over all rows, views and positions of this store, or with
    the mean and std of the same level in the encoder folder `standard` (another split's). `sums` are `block_sums` of each block
    of the base store, where they are known.
    Raises UserError when the base store is too small for a shape, or a channel is constant.
    """
    metadata = read_sealed_metadata(base)
    for shape in shapes:
        _check_fits(metadata, base, shape)
    unknown = unmeasured(base, shapes, standard)
    if unknown and sums is None:
        if "taken" in metadata.attributes["provenance"]["basis"]:
            raise UserError(
                f"{base} has another store's basis, so its levels need that store's standardisation: give --basis."
            )
        poolings = [pooling_of(shape, metadata.shape) for shape in unknown]
        blocks = range(-(-metadata.shape[0] // metadata.chunks[0]))
        sums = list(in_order(run(_sums_of_block, ((base, block, poolings) for block in blocks))))
    measured = dict(zip(unknown, map(merge_sums, zip(*sums)))) if unknown and sums is not None else {}
    specs = [_level_spec(base, metadata, shape, standard, measured.get(shape)) for shape in shapes]
    write_levels(specs, run)
    for spec in specs:
        if not is_sealed(spec.path):
            seal(spec, ordered_map=ordered_map(run))
    return [spec.path for spec in specs]


def unmeasured(base: Path, shapes: Sequence[Shape], standard: Path | None) -> list[Shape]:
    """The levels whose mean and std are to be measured: they are neither taken from another split nor stored."""
    return [] if standard else [shape for shape in shapes if not is_sealed(level_path(base.parent, shape))]


def pooling_of(shape: Shape, base: tuple[int, ...]) -> Pooling:
    """How a level is pooled from a base store of shape (rows, views, H, W, K)."""
    return Pooling(pooling_matrix(shape[0], base[2]), pooling_matrix(shape[1], base[3]), shape[2])


def block_sums(poolings: Sequence[Pooling], chunk: np.ndarray) -> BlockSums:
    """For each level the sums of what it pools from a block (rows, views, H, W, K)."""
    return tuple(sums_of(pooled(chunk, pooling)) for pooling in poolings)


def _sums_of_block(task: tuple[Path, int, Sequence[Pooling]]) -> BlockSums:
    base, block, poolings = task
    return block_sums(poolings, read_block(open_array(base), block))


def _level_spec(
    base: Path, metadata: ArrayMetadata, shape: Shape, standard: Path | None, measured: Sums | None
) -> ArraySpec:
    """What the level of `shape` beside a base store is to be; mean and std are measured, or else taken or stored."""
    path = level_path(base.parent, shape)
    pooling = pooling_of(shape, metadata.shape)
    rule: dict[str, Any] = {"fitted_on": "all rows, views and positions"}
    if measured is not None:
        mean, std = measured.mean, measured.std
        check_varies(std, shape_name(shape))
    elif standard is not None:
        mean, std = _standard_of(level_path(standard, shape), metadata)
        rule = {"taken": sha256(mean.tobytes() + std.tobytes()).hexdigest()}
    else:
        stored = read_metadata(path).attributes
        mean, std = np.array(stored["mean"]), np.array(stored["std"])
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


def write_levels(specs: Sequence[ArraySpec], run: Run) -> None:
    """Write the blocks that levels lack, from the base store beside them, of which each block is read once."""
    lacking: dict[int, list[LevelTask]] = {}
    for spec in specs:
        for block in prepare(spec):
            lacking.setdefault(block, []).append(level_task(spec, block))
    names = ", ".join(spec.path.stem for spec in specs)
    rows = sum(len(specs[0].rows_of(block)) for block in lacking)
    with tqdm(total=rows, desc=f"levels {names}", unit=" rows", smoothing=0.1, disable=not lacking) as progress:
        for _, done in run(_write_block_of_levels, (lacking[block] for block in sorted(lacking))):
            progress.update(done)


def level_task(spec: ArraySpec, block: int) -> LevelTask:
    """The task that writes a block of a level as its attributes say."""
    attributes = spec.attributes
    pooling = Pooling(
        np.array(attributes["pooling"]["rows"]), np.array(attributes["pooling"]["columns"]), spec.shape[-1]
    )
    mean, std = np.array(attributes["mean"]), np.array(attributes["std"])
    return LevelTask(spec, base_path(spec.path.parent), block, pooling, mean, std)


def _check_fits(base: ArrayMetadata, path: Path, shape: Shape) -> None:
    _, _, height, width, channels = base.shape
    name, there = shape_name(shape), existing_metadata(level_path(path.parent, shape))
    if there is not None and there.attributes["kind"] != "level":
        raise UserError(
            f"The level {name} would be where z_0 is, as the codec has the name of the encoder of {path}; ask for another shape."
        )
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
            f"featurize levels {path.stem} --encoder {quote(base.attributes['encoder'])} --out {quote(str(root_of(path)))}"
        )
    attributes = read_sealed_metadata(path).attributes
    if attributes["basis_sha256"] != base.attributes["basis_sha256"]:
        raise UserError(
            f"{path} has another basis than the base store it is to standardise; extract with --basis of that store."
        )
    return np.array(attributes["mean"], dtype=np.float64), np.array(attributes["std"], dtype=np.float64)


def pooled(chunk: np.ndarray, pooling: Pooling) -> np.ndarray:
    """(rows, views, h, w, C) float32 of a block (rows, views, H, W, K) of the base store."""
    chunk = chunk[..., : pooling.channels]
    rows, views = chunk.shape[:2]
    maps = pool(chunk.reshape(rows * views, *chunk.shape[2:]), pooling.rows, pooling.columns)
    return maps.reshape(rows, views, *maps.shape[1:])


def pooled_block(task: LevelTask) -> np.ndarray:
    """(rows, views, h, w, C) float32 of the task's block of the base store."""
    return pooled(read_block(open_array(task.base), task.block), task.pooling)


def standardised_block(task: LevelTask) -> np.ndarray:
    """The block as it is stored, but for the rounding to float16."""
    return (pooled_block(task) - task.mean) / task.std


def _write_block_of_levels(tasks: Sequence[LevelTask]) -> int:
    """Write one block of several levels; its number of rows."""
    chunk = read_block(open_array(tasks[0].base), tasks[0].block)
    for task in tasks:
        write_block(task.spec, task.block, (pooled(chunk, task.pooling) - task.mean) / task.std)
    return len(chunk)
