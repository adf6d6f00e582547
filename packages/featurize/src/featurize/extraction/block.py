"""Blocks of the base store and of `z_0`: images -> one crop -> encoder and codec -> the block in each array that lacks it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from featurize.basis.moments import Moments, Outliers, merge_all, merge_outliers, moments_of, save_moments
from featurize.basis.svd import load_basis, outliers_of
from featurize.codecs import load_codec
from featurize.encoders import encode, load_encoder
from featurize.execution.devices import device_of_worker
from featurize.execution.progress import progress_line
from featurize.execution.tasks import Run
from featurize.extraction.loader import Batch, Clock, Seen, batch_of, load_views
from featurize.extraction.networks import codec_spec, encoder_spec
from featurize.extraction.reading import Examined
from featurize.images.crop import InputSpec
from featurize.recipe import Features
from featurize.store.layout import basis_path, block_moments_path, is_sealed, moments_path
from featurize.store.ledger import Ledger
from featurize.store.metadata import ArraySpec, read_metadata
from featurize.store.write import prepare, write_block

Log = Callable[..., None]  # takes an event's name, and facts by name
Learn = Callable[
    [Sequence[int], Sequence[Examined | None]], None
]  # takes rows, and what was found out about their images


@dataclass(frozen=True)
class BlockTask:
    """One block of rows of the base store (its path and channels), of `z_0`, or of both."""

    block: int
    batch: Batch
    base: Path | None
    channels: int
    z0: Path | None


@dataclass(frozen=True)
class Encoded:
    """`z_0` and base store of the stored images of a batch, (rows, views, ...) float32, of their tokens the moments and the
    outliers, and what was seen of all images."""

    z0: np.ndarray | None
    base: np.ndarray | None
    moments: Moments | None
    outliers: Outliers | None
    seen: tuple[Seen, ...]


@dataclass(frozen=True)
class Done:
    """What a task did: what it saw of each image, and the seconds each stage took."""

    seen: tuple[Seen, ...]
    seconds: dict[str, float]


def write_images(
    base: ArraySpec | None,
    z0: ArraySpec | None,
    features: Features,
    ledger: Ledger,
    run: Run,
    log: Log,
    learn: Learn | None = None,
    unread: Sequence[int] = (),
) -> None:
    """Write the blocks that a base store, `z_0`, or both lack; each image is decoded once for both.

    Images of the ledger that have no digest are read for the first time: `learn` gets the rows of a block and what was found
    out. Those that turn out to be refused leave gaps of zeros. Blocks with rows that are `unread` are always written.
    """
    missing = {spec.path: set(prepare(spec)) for spec in (base, z0) if spec is not None}
    if base is not None:
        missing[base.path] |= _lacking_moments(base)
    either = base or z0
    assert either is not None
    for blocks_of_array in missing.values():  # a kill may have come between a block and what it found out
        blocks_of_array.update(row // either.rows_per_block for row in unread)
    blocks = sorted(set().union(*missing.values()))

    def task(block: int) -> BlockTask:
        return BlockTask(
            block,
            batch_of(ledger, either.rows_of(block), features),
            base.path if base is not None and block in missing[base.path] else None,
            base.shape[-1] if base is not None else 0,
            z0.path if z0 is not None and block in missing[z0.path] else None,
        )

    written = ledger.rows - sum(len(either.rows_of(block)) for block in blocks)
    with progress_line(ledger.rows, written, "extracting", ledger.refused) as advance:
        for index, done in run(_write_block, map(task, blocks)):
            if learn is not None:
                learn(either.rows_of(blocks[index]), [one.examined for one in done.seen])
            refused = sum(not one.is_stored for one in done.seen)
            log("block", block=blocks[index], **advance(len(done.seen), done.seconds, refused))


def _lacking_moments(base: ArraySpec) -> set[int]:
    """The blocks of which a power cut took the moments, which come before the record; none where the sum of all is there."""
    if is_sealed(base.path) or moments_path(base.path.parent).is_file():
        return set()
    return {block for block in range(base.blocks) if not block_moments_path(base.path, block).is_file()}


def _write_block(task: BlockTask) -> Done:
    """Write the task's block into each array that lacks it."""
    clock = Clock()
    encoded = encode_batch(task, clock)
    with clock.during("write"):
        if task.z0 is not None:
            write_block(task.z0, task.block, _with_gaps(encoded.z0, encoded.seen, task.z0))
        if task.base is not None:
            if encoded.moments is not None:
                path = block_moments_path(task.base, task.block)
                save_moments(path, encoded.moments, encoded.outliers, wait_for_name=False)
            write_block(task.base, task.block, _with_gaps(encoded.base, encoded.seen, task.base))
    return Done(encoded.seen, clock.seconds)


def _with_gaps(values: np.ndarray | None, seen: tuple[Seen, ...], array: Path) -> np.ndarray:
    """Values of the stored images as the rows of all, zeros where an image is refused."""
    stored = np.array([one.is_stored for one in seen])
    if values is not None and stored.all():
        return values
    rows = np.zeros((len(seen), *read_metadata(array).shape[1:]), dtype=np.float32)
    if values is not None:
        rows[stored] = values
    return rows


def encode_batch(task: BlockTask, clock: Clock) -> Encoded:
    """The values that the task asks for of its images; nothing is written."""
    device, features = device_of_worker(), task.batch.features
    takers: list[tuple[InputSpec, Callable[[np.ndarray, int], None]]] = []
    z0: list[np.ndarray] = []
    base: list[np.ndarray] = []
    moments: list[Moments] = []
    outliers: list[Outliers] = []
    seen: list[Seen] = []
    if task.z0 is not None:
        codec = load_codec(replace(codec_spec(features), device=device))
        takers.append((codec.input, lambda x_BHWC, n: z0.append(codec.encode(x_BHWC)[:n])))
    if task.base is not None:
        encoder = load_encoder(encoder_spec(features), device)
        basis = load_basis(basis_path(task.base.parent))

        def take_features(x_BHWC: np.ndarray, count: int) -> None:
            f_BHWD = encode(encoder, x_BHWC, device, features.precision)[:count]
            tokens_ND = f_BHWD.reshape(-1, f_BHWD.shape[-1])
            moments.append(moments_of(tokens_ND))
            outliers.append(outliers_of(basis, tokens_ND))
            base.append(basis.project(f_BHWD, task.channels))

        takers.append((task.batch.input_of(encoder), take_features))
    for inputs, count in load_views(task.batch, tuple(input_spec for input_spec, _ in takers), clock, seen):
        with clock.during("encode"):
            for x_BHWC, (_, take) in zip(inputs, takers, strict=True):
                take(x_BHWC, count)
    views = features.views
    return Encoded(
        _with_views(z0, views) if z0 else None,
        _with_views(base, views) if base else None,
        merge_all(moments) if moments else None,
        merge_outliers(outliers) if outliers else None,
        tuple(seen),
    )


def _with_views(parts: list[np.ndarray], views: int) -> np.ndarray:
    """(rows * views, ...) in parts to (rows, views, ...)."""
    values = np.concatenate(parts)
    return values.reshape(-1, views, *values.shape[1:])
