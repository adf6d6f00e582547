"""What a worker does: pictures of a block -> one crop -> encoder and codec -> the block in each array that lacks it."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from featurize.basis import svd as basis_
from featurize.basis.svd import Moments, Outliers
from featurize.errors import UserError
from featurize.execution.engine import decoding_threads, device_of_worker
from featurize.images.crop import Box, crop
from featurize.images.decode import BadImage, decode
from featurize.recipe import Features
from featurize.sources import SourceImage, read
from featurize.store.ledger import Ledger
from featurize.store.store import moments_path, write_block

if TYPE_CHECKING:  # torch takes seconds to import: the main process, which only hands out tasks, does without it
    from featurize.codecs import CodecSpec
    from featurize.encoders import EncoderSpec

INNER_BATCH = 32  # views a forward pass: fixed and padded, so that no setting changes a rounding
PICTURES_AHEAD = 4 * INNER_BATCH  # decoded beside a GPU
STAGES = ("read", "decode", "encode", "write")

Look = tuple[int, str]  # how a network sees a crop: its side in pixels, the interpolation


@dataclass(frozen=True)
class Batch:
    """Pictures to encode, and how."""

    pictures: tuple[SourceImage, ...]
    boxes: tuple[Box, ...]
    sha256s: tuple[str, ...]
    features: Features


@dataclass(frozen=True)
class FitTask:
    """A part of the subset that the basis is fitted on, and the file of its moments."""

    batch: Batch
    part: Path


@dataclass(frozen=True)
class BlockTask:
    """One block of rows of the base store, of `z_0`, or of both."""

    block: int
    batch: Batch
    base: Path | None
    basis: Path
    channels: int
    z0: Path | None


@dataclass
class Clock:
    """Seconds spent in each stage; threads that decode beside the encoder count together."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start


@dataclass(frozen=True)
class Encoded:
    """`z_0` and base store of some rows, (rows, views, ...) float32, and of their tokens the moments and the outliers."""

    z0: np.ndarray | None
    base: np.ndarray | None
    moments: Moments | None
    outliers: Outliers | None


@dataclass(frozen=True)
class Done:
    """What a task did: pictures, and the seconds each stage took."""

    pictures: int
    seconds: dict[str, float]


def encoder_spec(features: Features) -> EncoderSpec:
    """The encoder that a recipe or the command line asks for."""
    from featurize.encoders import EncoderSpec

    model_args = json.dumps(features.model_args, sort_keys=True)
    return EncoderSpec(features.encoder, features.weights, model_args, features.precision)


def codec_spec(features: Features) -> CodecSpec:
    """The codec of `z_0` that a recipe or the command line asks for."""
    from featurize.codecs import parse_codec

    return parse_codec(features.z0, features.z0_weights, features.z0_scale, features.source)


def check_text(features: Features) -> None:
    """Load the text encoder: weights that are missing or don't fit are found before any picture is read."""
    from featurize.text.clip_text import load_text_encoder, text_spec

    load_text_encoder(text_spec(features), "cpu")


def batch_of(ledger: Ledger, rows: range | list[int], features: Features) -> Batch:
    """The pictures of some rows, ready to be sent to a worker."""
    return Batch(*ledger.part(rows), features)


def fit_part(task: FitTask) -> Done:
    """Write the moments of a part's tokens, for the fit of the basis."""
    from featurize.encoders import encode, load_encoder

    clock, batch = Clock(), task.batch
    device = device_of_worker()
    encoder = load_encoder(encoder_spec(batch.features), device)
    parts = []
    for (x_BHWC,), count in _views(batch, ((encoder.input_size, encoder.interpolation),), clock):
        with clock.during("encode"):
            f_BHWD = encode(encoder, x_BHWC, device, batch.features.precision)[:count]
            parts.append(basis_.moments_of(f_BHWD.reshape(-1, f_BHWD.shape[-1])))
    with clock.during("write"):
        basis_.save_moments(task.part, basis_.merge_all(parts))
    return Done(len(batch.pictures), clock.seconds)


def write_one(task: BlockTask) -> Done:
    """Write the task's block into each array that lacks it."""
    clock = Clock()
    found = encode_batch(task, clock)
    with clock.during("write"):
        if task.z0 is not None and found.z0 is not None:
            write_block(task.z0, task.block, found.z0)
        if (
            task.base is not None
            and found.base is not None
            and found.moments is not None
            and found.outliers is not None
        ):
            basis_.save_moments(moments_path(task.base, task.block), found.moments, found.outliers)
            write_block(task.base, task.block, found.base)
    return Done(len(task.batch.pictures), clock.seconds)


def encode_batch(task: BlockTask, clock: Clock) -> Encoded:
    """What the task asks for of its rows; nothing is written."""
    from featurize.codecs import load_codec
    from featurize.encoders import encode, load_encoder

    device, features = device_of_worker(), task.batch.features
    takers: list[tuple[Look, Callable[[np.ndarray, int], None]]] = []
    z0: list[np.ndarray] = []
    base: list[np.ndarray] = []
    moments: list[Moments] = []
    outliers: list[Outliers] = []
    if task.z0 is not None:
        codec = load_codec(replace(codec_spec(features), device=device))
        takers.append(((codec.size, codec.interpolation), lambda x_BHWC, n: z0.append(codec.encode(x_BHWC)[:n])))
    if task.base is not None:
        encoder = load_encoder(encoder_spec(features), device)
        basis = basis_.load_basis(task.basis)

        def take_features(x_BHWC: np.ndarray, count: int) -> None:
            f_BHWD = encode(encoder, x_BHWC, device, features.precision)[:count]
            tokens_ND = f_BHWD.reshape(-1, f_BHWD.shape[-1])
            moments.append(basis_.moments_of(tokens_ND))
            outliers.append(basis_.outliers_of(basis, tokens_ND))
            base.append(basis.project(f_BHWD, task.channels))

        takers.append(((encoder.input_size, encoder.interpolation), take_features))
    for looked, count in _views(task.batch, tuple(look for look, _ in takers), clock):
        with clock.during("encode"):
            for x_BHWC, (_, take) in zip(looked, takers, strict=True):
                take(x_BHWC, count)
    views = features.views
    return Encoded(
        _with_views(z0, views) if z0 else None,
        _with_views(base, views) if base else None,
        basis_.merge_all(moments) if moments else None,
        basis_.add_all(outliers) if outliers else None,
    )


def _views(batch: Batch, looks: tuple[Look, ...], clock: Clock) -> Iterator[tuple[list[np.ndarray], int]]:
    """(for each look uint8 x_BHWC of INNER_BATCH views, how many of them are real); views of a row lie side by side."""
    crops, views = _crops(batch, looks, clock), batch.features.views
    while part := list(islice(crops, INNER_BATCH // views)):
        yield [_stacked(pictures, views) for pictures in zip(*part)], len(part) * views


def _stacked(pictures: Sequence[np.ndarray], views: int) -> np.ndarray:
    """The pictures, each followed by its flip when there are two views, filled up with black."""
    x_BHWC = np.zeros((INNER_BATCH, *pictures[0].shape), dtype=np.uint8)
    x_BHWC[: len(pictures) * views : views] = pictures
    if views == 2:
        x_BHWC[1 : len(pictures) * views : views] = np.stack(pictures)[:, :, ::-1]
    return x_BHWC


def _crops(batch: Batch, looks: tuple[Look, ...], clock: Clock) -> Iterator[tuple[np.ndarray, ...]]:
    """The crops of each picture, one a look. Only they are kept: a decoded picture may be a hundred times larger."""
    threads = decoding_threads()
    jobs = zip(batch.pictures, batch.boxes, batch.sha256s, strict=True)

    def timed(found: tuple[tuple[np.ndarray, ...], float, float]) -> tuple[np.ndarray, ...]:
        clock.seconds["read"] += found[1] / max(1, threads)
        clock.seconds["decode"] += found[2] / max(1, threads)
        return found[0]

    if not threads:
        yield from (timed(_crops_of(*job, looks)) for job in jobs)
        return
    with ThreadPoolExecutor(threads) as pool:  # Pillow decodes without the interpreter's lock
        waiting: deque[Future] = deque()
        for job in jobs:
            waiting.append(pool.submit(_crops_of, *job, looks))
            if len(waiting) > PICTURES_AHEAD:
                yield timed(waiting.popleft().result())
        while waiting:
            yield timed(waiting.popleft().result())


def _crops_of(
    picture: SourceImage, box: Box, digest: str, looks: tuple[Look, ...]
) -> tuple[tuple[np.ndarray, ...], float, float]:
    """(uint8 (S, S, 3) for each look, seconds of reading, seconds of decoding and resizing)."""
    start = time.perf_counter()
    try:
        data = read(picture)
        read_at = time.perf_counter()
        if sha256(data).hexdigest() != digest:
            raise BadImage("its bytes are others")
        image = decode(data)
    except UserError:  # a remote place does not answer: that says nothing about the picture
        raise
    except Exception as error:
        raise UserError(
            f"The picture {picture.key} ({picture.source}) has changed since the ledger was made: {error}; "
            "bring it back, or remove the store root and extract again."
        ) from None
    crops = tuple(crop(image, box, size, interpolation) for size, interpolation in looks)
    return crops, read_at - start, time.perf_counter() - read_at


def _with_views(parts: list[np.ndarray], views: int) -> np.ndarray:
    """(rows * views, ...) in parts to (rows, views, ...)."""
    values = np.concatenate(parts)
    return values.reshape(-1, views, *values.shape[1:])
