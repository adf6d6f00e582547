"""Images of a ledger read, decoded and cropped, in batches of one size."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from featurize.encoders import EncoderDescription
from featurize.execution.decoders import SLOT, decoded
from featurize.execution.devices import decoders, device_of_worker, views_per_batch
from featurize.extraction.reading import Examined, Reader, first_look, load_crops_of, readers
from featurize.images.crop import CropRule, InputSpec, crop, cropped, parse_rule
from featurize.images.on_device import decode_on_device
from featurize.recipe import Features
from featurize.sources import SourceImage
from featurize.store.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor

INNER_BATCH = 32  # views a forward pass at least, padded, so that no setting changes a rounding
ROWS_PER_JOB = 32  # images that a decoder is given at once, where a slot has room for so many
ROOM_FOR_FILE = 256 << 10  # bytes of a slot for a file that is left to nvJPEG; ImageNet's have 110,000 on average
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
class _Part:
    """Some images of a batch to be loaded, and for which inputs."""

    batch: Batch
    inputs: tuple[InputSpec, ...]


@dataclass(frozen=True)
class _Loaded:
    """What was seen of a part's images, the seconds that it took, and the crops of those that are stored, for each input uint8
    (n, S, S, 3); None where they lie in the slot. By an image's place in the part, the file that is left to nvJPEG to decode:
    its bytes, or where they lie in the slot."""

    seen: tuple[Seen, ...]
    reading: float
    decoding: float
    crops: list[np.ndarray] | None
    files: dict[int, bytes | slice]


def load_views(
    batch: Batch, inputs: tuple[InputSpec, ...], clock: Clock, seen: list[Seen]
) -> Generator[tuple[list[Tensor], int], None, None]:
    """(for each input uint8 x_BHWC on the worker's device, how many of its views are real); views of a row lie side by side.

    All have the same size B, the last padded with black. Refused images are left out. `seen` gets an entry for each image.
    """
    import torch

    device, views = device_of_worker(), batch.features.views
    side = max(spec.side for spec in inputs)
    rows = views_per_batch(device, INNER_BATCH, len(batch.images) * views, side) // views
    x: list[Tensor] = []
    taken = 0
    for left in _load_crops(batch, inputs, device, clock, seen):
        while len(left[0]):
            with _copying(device):
                if not taken:
                    x = [torch.empty((rows, *own.shape[1:]), dtype=torch.uint8, device=device) for own in left]
                count = min(len(left[0]), rows - taken)
                for x_RHWC, own in zip(x, left, strict=True):
                    x_RHWC[taken : taken + count].copy_(own[:count], non_blocking=True)
            left = [own[count:] for own in left]
            taken += count
            if taken == rows:
                yield [_with_flips(x_RHWC, taken, views) for x_RHWC in x], taken * views
                taken = 0
    if taken:
        yield [_with_flips(x_RHWC, taken, views) for x_RHWC in x], taken * views


@contextmanager
def _copying(device: str) -> Iterator[None]:
    """Copies beside what a GPU computes, which are done when the block ends: the slot that they come from is filled again."""
    if device == "cpu":
        yield
        return
    import torch

    stream = _copies(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


@cache
def _copies(device: str) -> Any:
    import torch

    return torch.cuda.Stream(device)


def _with_flips(x_RHWC: Tensor, taken: int, views: int) -> Tensor:
    """The images that were taken, black after them, each followed by its flip when there are two views."""
    import torch

    if x_RHWC.is_cuda:
        x_RHWC.record_stream(torch.cuda.current_stream(x_RHWC.device))  # made for copies, and used here
    x_RHWC[taken:] = 0
    return x_RHWC if views == 1 else torch.stack([x_RHWC, x_RHWC.flip(2)], dim=1).flatten(0, 1)


def _load_crops(
    batch: Batch, inputs: tuple[InputSpec, ...], device: str, clock: Clock, seen: list[Seen]
) -> Iterator[list[Tensor]]:
    """The crops of the stored images, part by part, one tensor an input. Each holds until the next one is asked for.

    Nothing else stays in memory: decoded, an image may be 100 times larger.
    """
    import torch

    count = decoders()
    parts = list(_parts(batch, inputs))
    if count:
        loaded: Generator[tuple[_Loaded, np.ndarray], None, None] = decoded(_load_part, parts, count)
    else:
        unread = readers(batch.images, list(map(bool, batch.sha256s)))
        slot = np.empty(SLOT, dtype=np.uint8)
        loaded = ((_load_part(part, slot, unread), slot) for part in parts)
    with closing(loaded):
        for part, (one, slot) in zip(parts, loaded, strict=True):
            clock.seconds["read"] += one.reading / max(1, count)
            clock.seconds["decode"] += one.decoding / max(1, count)
            stored = sum(seen_.is_stored for seen_ in one.seen)
            arrays = one.crops if one.crops is not None else _laid_out(slot, inputs, len(one.seen))
            crops, seen_here = [torch.from_numpy(own[:stored]) for own in arrays], list(one.seen)
            if one.files:
                with clock.during("decode"), _copying(device):
                    crops, seen_here = _with_files(part, one, slot, crops, device)
            seen += seen_here
            if len(crops[0]):
                yield crops


def _with_files(
    part: _Part, loaded: _Loaded, slot: np.ndarray, crops: list[Tensor], device: str
) -> tuple[list[Tensor], list[Seen]]:
    """The crops of a part on the device, and what was seen, now that its files are decoded there.

    Pillow judges a file that nvJPEG refuses: what it can decode is stored as it decodes it.
    """
    import torch

    batch, seen = part.batch, list(loaded.seen)
    as_pillow = replace(batch, features=batch.features.model_copy(update={"decoder": "pillow"}))
    crops = [own.to(device) for own in crops]
    rows = np.cumsum([one.is_stored for one in seen]) - 1
    files = [slot[file] if isinstance(file, slice) else file for file in loaded.files.values()]
    for place, file, image in zip(loaded.files, files, decode_on_device(files, device), strict=True):
        if image is not None:
            new = [cropped(image, batch.crop, spec).x_CHW.permute(1, 2, 0) for spec in part.inputs]
        else:
            examined, own, *_ = _load(
                as_pillow, part.inputs, batch.images[place], partial(bytes, file), batch.sha256s[place]
            )
            seen[place] = Seen(examined, own is not None)
            new = [torch.tensor(pixels) for pixels in own or ()]
        for all_RHWC, pixels in zip(crops, new):
            all_RHWC[rows[place]].copy_(pixels)
    kept = [
        int(row) for row, before, now in zip(rows, loaded.seen, seen, strict=True) if before.is_stored and now.is_stored
    ]
    return [own if len(kept) == len(own) else own[kept] for own in crops], seen


def _parts(batch: Batch, inputs: tuple[InputSpec, ...]) -> Iterator[_Part]:
    bytes_per_row = sum(map(_bytes_of, inputs)) + ROOM_FOR_FILE * (batch.features.decoder == "nvjpeg")
    rows = max(1, min(ROWS_PER_JOB, SLOT // bytes_per_row))
    for start in range(0, len(batch.images), rows):
        part = slice(start, start + rows)
        yield _Part(replace(batch, images=batch.images[part], sha256s=batch.sha256s[part]), inputs)


def _bytes_of(spec: InputSpec) -> int:
    return spec.side * spec.side * 3


def _laid_out(slot: np.ndarray, inputs: tuple[InputSpec, ...], rows: int) -> list[np.ndarray]:
    """Where crops of so many images lie in a slot, for each input uint8 (rows, S, S, 3)."""
    ends = np.cumsum([rows * _bytes_of(spec) for spec in inputs])
    parts = np.split(slot[: ends[-1]], ends[:-1])
    return [part.reshape(rows, spec.side, spec.side, 3) for part, spec in zip(parts, inputs, strict=True)]


def _load_part(part: _Part, slot: np.ndarray, unread: Iterator[Reader] | None = None) -> _Loaded:
    """Fill the slot with the crops of a part's stored images. `unread` gives their bytes, where it is read ahead already."""
    batch, inputs = part.batch, part.inputs
    unread = readers(batch.images, list(map(bool, batch.sha256s))) if unread is None else unread
    rows = len(batch.images)
    taken = rows * sum(map(_bytes_of, inputs))
    fits = taken <= slot.nbytes
    own = _laid_out(slot if fits else np.empty(taken, dtype=np.uint8), inputs, rows)
    seen: list[Seen] = []
    files: dict[int, bytes | slice] = {}
    reading = decoding = 0.0
    stored = 0
    for image, reader, digest in zip(batch.images, unread, batch.sha256s):  # no more of the readers than images
        examined, crops, *seconds = _load(batch, inputs, image, reader, digest)
        reading, decoding = reading + seconds[0], decoding + seconds[1]
        if isinstance(crops, bytes):
            end = taken + len(crops)
            files[len(seen)] = slice(taken, end) if end <= slot.nbytes else crops
            if end <= slot.nbytes:
                slot[taken:end] = np.frombuffer(crops, dtype=np.uint8)
                taken = end
        elif crops is not None:
            for place, pixels in zip(own, crops, strict=True):
                place[stored] = pixels
        seen.append(Seen(examined, crops is not None))
        stored += crops is not None
    return _Loaded(tuple(seen), reading, decoding, None if fits else own, files)


def _load(
    batch: Batch, inputs: tuple[InputSpec, ...], image: SourceImage, reader: Reader, digest: str
) -> tuple[Examined | None, tuple[np.ndarray, ...] | bytes | None, float, float]:
    """(what a first look says of an image, None where it was known; its crops, None where it is refused, or its file where that
    is left to nvJPEG; seconds of waiting for the bytes; seconds of decoding and resizing)."""
    features = batch.features
    how = features.icc, features.least_side, features.decoder
    if digest:
        return None, *load_crops_of(image, reader, digest, batch.crop, inputs, *how)
    look = first_look(reader, *how)
    start = time.perf_counter()
    crops: tuple[np.ndarray, ...] | bytes | None = None
    if isinstance(look.image, bytes):
        crops = look.image
    elif look.image is not None and not look.examined.refusal(features.strict):
        crops = tuple(crop(look.image, batch.crop, spec) for spec in inputs)
    return look.examined, crops, look.reading, look.decoding + time.perf_counter() - start
