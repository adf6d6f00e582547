"""Images of a ledger read, decoded and cropped, in batches of one size."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from itertools import islice
from typing import Any

import numpy as np

from featurize.encoders import EncoderDescription
from featurize.errors import UserError
from featurize.execution.devices import decoding_threads
from featurize.extraction.reading import Examined, Reader, first_look, readers
from featurize.images.crop import CropRule, InputSpec, crop, parse_rule
from featurize.images.decode import Profile, decode
from featurize.images.reasons import BadImage
from featurize.recipe import Features
from featurize.sources import SourceImage
from featurize.store.ledger import Ledger

INNER_BATCH = 32  # views a forward pass: fixed and padded, so that no setting changes a rounding
IMAGES_AHEAD = 4 * INNER_BATCH  # decoded beside a GPU
STAGES = ("read", "decode", "encode", "write")


@dataclass(frozen=True)
class Batch:
    """Images to encode, their digests ("" for one that is read for the first time, and may be refused), and how."""

    images: tuple[SourceImage, ...]
    sha256s: tuple[str, ...]
    crop: CropRule
    features: Features

    def input_of(self, encoder: EncoderDescription) -> InputSpec:
        """What the encoder is given of these images."""
        return InputSpec(self.crop.side(encoder.input_size), encoder.interpolation)


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


def batch_of(ledger: Ledger, rows: range | list[int], features: Features) -> Batch:
    """The images of some rows, ready to be sent to a worker."""
    return Batch(*ledger.part(rows), parse_rule(ledger.crop), features)


@dataclass(frozen=True)
class Seen:
    """What a batch's image turned out to be: what a first look says of it (None: it was known), and whether it is stored."""

    examined: Examined | None
    is_stored: bool


@dataclass(frozen=True)
class Loaded:
    """What a first look says of an image, its crops, one an input (None where it is refused), and the seconds it took."""

    examined: Examined | None
    crops: tuple[np.ndarray, ...] | None
    reading: float
    decoding: float


def load_views(
    batch: Batch, inputs: tuple[InputSpec, ...], clock: Clock, seen: list[Seen]
) -> Iterator[tuple[list[np.ndarray], int]]:
    """(for each input uint8 x_BHWC of INNER_BATCH views, how many of them are real); views of a row lie side by side.

    Refused images are left out. `seen` gets an entry for each image.
    """
    crops, views = _load_crops(batch, inputs, clock, seen), batch.features.views
    while part := list(islice(crops, INNER_BATCH // views)):
        yield [_stacked(images, views) for images in zip(*part)], len(part) * views


def _stacked(images: Sequence[np.ndarray], views: int) -> np.ndarray:
    """The images, each followed by its flip when there are two views, filled up with black."""
    x_BHWC = np.zeros((INNER_BATCH, *images[0].shape), dtype=np.uint8)
    x_BHWC[: len(images) * views : views] = images
    if views == 2:
        x_BHWC[1 : len(images) * views : views] = np.stack(images)[:, :, ::-1]
    return x_BHWC


def _load_crops(
    batch: Batch, inputs: tuple[InputSpec, ...], clock: Clock, seen: list[Seen]
) -> Iterator[tuple[np.ndarray, ...]]:
    """The crops of each stored image, one an input. Nothing else stays in memory: decoded, an image may be 100 times larger."""
    threads = decoding_threads()
    were_read = list(map(bool, batch.sha256s))
    jobs = zip(batch.images, readers(batch.images, were_read), batch.sha256s, strict=True)

    def stored(loaded: Iterator[Loaded]) -> Iterator[tuple[np.ndarray, ...]]:
        for one in loaded:
            clock.seconds["read"] += one.reading / max(1, threads)
            clock.seconds["decode"] += one.decoding / max(1, threads)
            seen.append(Seen(one.examined, one.crops is not None))
            if one.crops is not None:
                yield one.crops

    if not threads:
        yield from stored(_load(batch, inputs, *job) for job in jobs)
        return
    with ThreadPoolExecutor(threads) as pool:  # Pillow decodes without the interpreter's lock
        yield from stored(_ahead(pool, partial(_load, batch, inputs), jobs))


def _ahead(pool: ThreadPoolExecutor, load: Callable[..., Loaded], jobs: Iterable[tuple[Any, ...]]) -> Iterator[Loaded]:
    """The jobs' results in order, a few of them computed ahead."""
    waiting: deque[Future] = deque()
    for job in jobs:  # as memory for their bytes allows
        waiting.append(pool.submit(load, *job))
        if len(waiting) > IMAGES_AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _load(batch: Batch, inputs: tuple[InputSpec, ...], image: SourceImage, reader: Reader, digest: str) -> Loaded:
    features = batch.features
    if digest:
        return Loaded(None, *load_crops_of(image, reader, digest, batch.crop, inputs, features.icc))
    look = first_look(reader, features.icc)
    start = time.perf_counter()
    crops = None
    if look.image is not None and not look.examined.refusal(features.strict):
        crops = tuple(crop(look.image, batch.crop, spec) for spec in inputs)
    return Loaded(look.examined, crops, look.reading, look.decoding + time.perf_counter() - start)


def load_crops_of(
    image: SourceImage,
    reader: Reader,
    digest: str,
    rule: CropRule,
    inputs: tuple[InputSpec, ...],
    profile: Profile,
) -> tuple[tuple[np.ndarray, ...], float, float]:
    """(uint8 (S, S, 3) for each input, seconds of waiting for the bytes, seconds of decoding and resizing).

    Raises UserError for an image whose bytes have another SHA-256 than `digest`, and for a file that is gone or may not be read.
    """
    start = time.perf_counter()
    try:
        data = reader()
        read_at = time.perf_counter()
        if sha256(data).hexdigest() != digest:
            raise BadImage("its bytes are others")
        decoded = decode(data, profile)
    except UserError:  # a disk is gone, or a remote place does not answer: that says nothing about the image
        raise
    except PermissionError:
        raise UserError(
            f"The picture {image.key} ({image.source}) may not be read any more; fix its permissions and run the same command "
            "again, it goes on."
        ) from None
    except Exception as error:
        raise UserError(
            f"The picture {image.key} ({image.source}) has changed since the ledger was made: {error}; "
            "restore the file, or remove the store root and extract again."
        ) from None
    crops = tuple(crop(decoded, rule, spec) for spec in inputs)
    return crops, read_at - start, time.perf_counter() - read_at
