"""What a worker does: pictures of a block -> one crop -> encoder and codec -> the block in each array that lacks it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featurize import basis as basis_
from featurize.basis import Moments
from featurize.codecs import Codec, CodecSpec, load_codec
from featurize.encoders import EncoderSpec, encode, load_encoder
from featurize.engine import device_of_worker
from featurize.errors import UserError
from featurize.ledger import Ledger
from featurize.pictures import Box, crop, decode
from featurize.sources import Picture, read
from featurize.store import moments_path, write_block

INNER_BATCH = 32  # views a forward pass: fixed and padded, so that no setting changes a rounding


@dataclass(frozen=True)
class Batch:
    """Pictures to encode, and how."""

    pictures: tuple[Picture, ...]
    boxes: tuple[Box, ...]
    encoder: EncoderSpec
    views: int


@dataclass(frozen=True)
class BlockTask:
    """One block of rows of the base store, of `z_0`, or of both."""

    block: int
    batch: Batch
    base: Path | None
    basis: Path
    channels: int
    z0: Path | None
    codec: CodecSpec


def batch_of(ledger: Ledger, rows: range | list[int], spec: EncoderSpec, views: int) -> Batch:
    return Batch(tuple(ledger.pictures[row] for row in rows), tuple(ledger.boxes[row] for row in rows), spec, views)


def batch_moments(batch: Batch) -> Moments:
    parts = [basis_.moments_of(f.reshape(-1, f.shape[-1])) for f in _features(batch, _decode_all(batch))]
    return basis_.merge_all(parts)


def write_one(task: BlockTask) -> int:
    """Write the task's block into each array that lacks it; the number of pictures."""
    images = _decode_all(task.batch)
    if task.z0 is not None:
        codec = load_codec(CodecSpec(**(vars(task.codec) | {"device": device_of_worker()})))
        write_block(task.z0, task.block, _encode_z0(codec, images, task.batch))
    if task.base is not None:
        basis = basis_.load_basis(task.basis)
        projected, moments = [], []
        for f in _features(task.batch, images):
            moments.append(basis_.moments_of(f.reshape(-1, f.shape[-1])))
            projected.append(basis.project(f, task.channels))
        basis_.save_moments(moments_path(task.base, task.block), basis_.merge_all(moments))
        write_block(task.base, task.block, _with_views(np.concatenate(projected), task.batch.views))
    return len(task.batch.pictures)


def _decode_all(batch: Batch) -> list[Any]:
    """The pictures as RGB. Raises UserError for one that could be read when the ledger was made and can't be now."""

    def one(picture: Picture) -> Any:
        try:
            return decode(read(picture))
        except Exception as error:
            raise UserError(
                f"The picture {picture.key} ({picture.source}) has changed since the ledger was made: {error}; "
                "bring it back, or remove the store root and extract again."
            ) from None

    if device_of_worker() == "cpu":
        return [one(picture) for picture in batch.pictures]
    with ThreadPoolExecutor(8) as pool:  # a GPU waits for pictures; Pillow decodes without the interpreter's lock
        return list(pool.map(one, batch.pictures))


def _crops(images: list[Any], batch: Batch, size: int, interpolation: str) -> Iterator[np.ndarray]:
    """uint8 (S, S, 3) of each picture, and of its flip when there are two views, row by row."""
    for image, box in zip(images, batch.boxes, strict=True):
        picture = crop(image, box, size, interpolation)
        yield picture
        if batch.views == 2:
            yield picture[:, ::-1]


def _features(batch: Batch, images: list[Any]) -> Iterator[np.ndarray]:
    """f_BHWD float32, in batches of a fixed size, views of a row next to each other."""
    device = device_of_worker()
    encoder = load_encoder(batch.encoder, device)
    for x_BHWC, count in _inner_batches(_crops(images, batch, encoder.input_size, encoder.interpolation)):
        yield encode(encoder, x_BHWC, device, batch.encoder.precision).numpy()[:count]


def _encode_z0(codec: Codec, images: list[Any], batch: Batch) -> np.ndarray:
    crops = _crops(images, batch, codec.size, codec.interpolation)
    z = np.concatenate([codec.encode(x_BHWC)[:count] for x_BHWC, count in _inner_batches(crops)])
    return _with_views(z, batch.views)


def _inner_batches(crops: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, int]]:
    """(uint8 batch of INNER_BATCH, how many of it are real): the last one is filled up with black."""
    waiting: list[np.ndarray] = []
    for picture in crops:
        waiting.append(picture)
        if len(waiting) == INNER_BATCH:
            yield np.stack(waiting), INNER_BATCH
            waiting = []
    if waiting:
        count = len(waiting)
        yield np.stack(waiting + [np.zeros_like(waiting[0])] * (INNER_BATCH - count)), count


def _with_views(values: np.ndarray, views: int) -> np.ndarray:
    """(rows * views, ...) to (rows, views, ...)."""
    return values.reshape(-1, views, *values.shape[1:])
