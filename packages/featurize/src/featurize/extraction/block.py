"""Blocks of the base store and of `z_0`: images -> one crop -> encoder and codec -> the block in each array that lacks it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featurize.basis.moments import Moments, Outliers, merge, moments_of, on_host, save_moments
from featurize.basis.svd import count_outliers, distances_of, load_basis
from featurize.codecs import load_codec
from featurize.encoders import encode, load_encoder
from featurize.errors import UserError
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
from featurize.store.metadata import ArraySpec, changed_keys, read_metadata
from featurize.store.write import check_same_array, prepare, write_block

if TYPE_CHECKING:
    from torch import Tensor

Log = Callable[..., None]  # takes an event's name, and facts by name
Learn = Callable[
    [Sequence[int], Sequence[Examined | None]], None
]  # takes rows, and what was found out about their images

LOADING = threading.Lock()  # of networks, which two tasks of a worker would else load twice


@dataclass(frozen=True)
class BlockTask:
    """One block of rows of the base store, of `z_0`, or of both."""

    block: int
    batch: Batch
    base: ArraySpec | None
    z0: ArraySpec | None


@dataclass(frozen=True)
class Encoded:
    """`z_0` and base store of the stored images of a batch, (rows, views, ...) float16 as they are stored, of their tokens the
    moments and the outliers, and what was seen of all images."""

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
            base if base is not None and block in missing[base.path] else None,
            z0 if z0 is not None and block in missing[z0.path] else None,
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
            write_block(task.z0, task.block, _with_gaps(encoded.z0, encoded.seen, task.z0.path))
        if task.base is not None:
            if encoded.moments is not None:
                check_same_array(task.base)
                path = block_moments_path(task.base.path, task.block)
                save_moments(path, encoded.moments, encoded.outliers, wait_for_name=False)
            write_block(task.base, task.block, _with_gaps(encoded.base, encoded.seen, task.base.path))
    return Done(encoded.seen, clock.seconds)


def _with_gaps(values: np.ndarray | None, seen: tuple[Seen, ...], array: Path) -> np.ndarray:
    """Values of the stored images as the rows of all, zeros where an image is refused."""
    stored = np.array([one.is_stored for one in seen])
    if values is not None and stored.all():
        return values
    rows = np.zeros((len(seen), *read_metadata(array).shape[1:]), dtype=np.float16)
    if values is not None:
        rows[stored] = values
    return rows


def _check_same(array: Path, network: str, identity: dict[str, Any]) -> None:
    """Raises UserError where an array was begun with other weights, as where their file was overwritten during the run."""
    if changed_keys(read_metadata(array).attributes["provenance"][network], identity):
        raise UserError(
            f"{array} was begun with other weights of its {network}; put those back and run the same command again."
        )


def encode_batch(task: BlockTask, clock: Clock) -> Encoded:
    """The values that the task asks for of its images; nothing is written. Until all are there nothing leaves the device."""
    device, features = device_of_worker(), task.batch.features
    takers: list[tuple[InputSpec, Callable[[Tensor, int], None]]] = []
    z0: list[Tensor] = []
    base: list[Tensor] = []
    moments: list[Moments] = []  # at most one: those of all batches so far
    distances: list[tuple[Tensor, Tensor]] = []
    seen: list[Seen] = []
    with LOADING:
        if task.z0 is not None:
            codec = load_codec(replace(codec_spec(features), device=device))
            _check_same(task.z0.path, "codec", codec.identity)
            takers.append((codec.input, lambda x_BHWC, n: z0.append(codec.encode(x_BHWC)[:n].half())))
        if task.base is not None:
            encoder = load_encoder(encoder_spec(features), device)
            _check_same(task.base.path, "encoder", encoder.identity)
            basis = load_basis(basis_path(task.base.path.parent)).on(device)
            channels = task.base.shape[-1]

            def take_features(x_BHWC: Tensor, count: int) -> None:
                f_BHWD = encode(encoder, x_BHWC, device, features.precision)[:count]
                tokens_ND = f_BHWD.flatten(0, 2)
                moments[:] = [reduce(merge, [*moments, moments_of(tokens_ND)])]
                distances.append(distances_of(basis, tokens_ND))
                base.append(basis.project(f_BHWD, channels).half())

            takers.append((task.batch.input_of(encoder), take_features))
    with closing(load_views(task.batch, tuple(input_spec for input_spec, _ in takers), clock, seen)) as batches:
        for inputs, count in batches:
            with clock.during("encode"):
                for x_BHWC, (_, take) in zip(inputs, takers, strict=True):
                    take(x_BHWC, count)
    with clock.during("encode"):  # which a GPU may only do now
        return Encoded(
            _on_host(z0).reshape(-1, features.views, *z0[0].shape[1:]) if z0 else None,
            _on_host(base).reshape(-1, features.views, *base[0].shape[1:]) if base else None,
            on_host(moments[0]) if moments else None,
            count_outliers(*map(_on_host, zip(*distances))) if distances else None,
            tuple(seen),
        )


def _on_host(parts: Sequence[Tensor]) -> np.ndarray:
    """All parts, one after the other, copied from their device at once."""
    import torch

    return torch.cat(list(parts)).cpu().numpy()
