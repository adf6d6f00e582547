"""What an extraction will take, before it starts: rows, bytes of each store, hours at a given or a measured rate."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from featurize.codecs import describe_codec
from featurize.codecs import kinds as codec_kinds
from featurize.encoders import describe_encoder, kind_of
from featurize.errors import UserError
from featurize.execution.devices import default_workers
from featurize.extraction.extract import extract
from featurize.extraction.fit import with_stored_basis_rows
from featurize.extraction.loader import INNER_BATCH
from featurize.extraction.networks import codec_spec, encoder_spec
from featurize.extraction.targets import base_channels
from featurize.io.files import is_local, remove_folder, resolve_path
from featurize.recipe import OWN_BASIS, Features, Request
from featurize.sources import SourceImage, list_images
from featurize.sources.class_lists import read_classes
from featurize.sources.coco import COUNTS
from featurize.store.layout import base_path, encoder_folder, labels_path, level_path, log_path, text_path, z0_path

HALF = 2  # bytes of a float16
TEXT = (77, 768)  # tokens and width of CLIP ViT-L/14's text tower
PUBLISHED = {"imagenet-train": 1_281_167, "imagenet-val": 50_000} | {
    f"coco{name[-4:]}-{name[:-4]}": pictures for name, pictures in COUNTS.items()
}  # pictures by source and split, for plans where they are not at hand
TRIAL = 10.0  # seconds that the blocks of a trial should take
ENOUGH = 0.5  # of it is taken as it is


@dataclass(frozen=True)
class Store:
    """One array: its name in the store root and its shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Uncompressed, as stores are: float16, or int64 for a vector of labels."""
        return math.prod(self.shape) * (8 if len(self.shape) == 1 else HALF)


def estimate(
    request: Request,
    rows: int | None,
    rate: float | None,
    measure: bool,
    workers: int | None = None,
    scheduler: str | None = None,
    decoders: int | None = None,
) -> str:
    """The text of `featurize plan`. Nothing stays written; with `measure` some pictures are extracted by the engine that
    `workers`, `scheduler` and `decoders` name.

    `rows` stands in for the pictures of a source that is not here, `rate` is pictures a second. ImageNet's and COCO's
    published numbers are taken where neither is given. Raises UserError where the number of images can't be found out,
    and for levels that the encoder can't give.
    """
    features = with_stored_basis_rows(request.features, resolve_path(request.features.out))
    images, why_not = _images(features) if rows is None else ((), None)
    if rows is None:
        rows = len(images) or _published(features)
    fitted = min(features.basis_rows, rows) if features.basis in (None, OWN_BASIS) else 0
    captions = sum(len(image.captions) for image in images) if images else 5 * rows
    stores = stores_of(request, rows, captions)
    lines = [
        f"{rows:,} pictures of {features.source or 'an unnamed source'}, {features.views} view(s), into {features.out}",
        *([f"  (so many are published; these can't be counted: {why_not})"] if why_not else []),
    ]
    wide = max(len(store.name) for store in stores)
    for store in stores:
        lines.append(f"  {store.name:<{wide}}  {'x'.join(map(str, store.shape)):<24} {_size(store.bytes):>9}")
    lines.append(f"  {'together':<{wide}}  {'':<24} {_size(sum(store.bytes for store in stores)):>9}")
    if measure:
        if not images:
            raise UserError("--measure needs the pictures; leave --rows out.")
        speed = measured_speed(request, rows, workers, scheduler, decoders)
        lines.append(
            f"measured with {speed.workers} worker(s) on {speed.pictures:,} pictures: {1 / speed.each:.3g} pictures/s, all "
            f"stages together; {speed.start + speed.once:.1f} s to start and to end"
        )
        lines.append(
            f"hours: {speed.seconds(rows, fitted) / 3600:.3g} ({fitted:,} pictures are encoded once more, for the basis: "
            f"{fitted * speed.fit / 3600:.3g})"
        )
    elif rate is None:
        lines.append("hours: give --rate PICTURES_A_SECOND, or --measure to extract some of them")
    else:
        encoded = rows + fitted
        lines.append(
            f"hours: {encoded / rate / 3600:.3g} at {rate:.4g} pictures/s ({encoded:,} pictures are encoded, "
            f"{fitted:,} of them first for the basis)"
        )
    return "\n".join(lines)


def _images(features: Features) -> tuple[tuple[SourceImage, ...], str | None]:
    """The source's images; or none and why, where it is not here but published. Raises UserError where it is neither."""
    if features.source is None:
        raise UserError("How many pictures? Give --rows N, or a recipe with features.source.")
    try:
        return list_images(features.source, features.split, features.limit, features.classes).images, None
    except UserError as error:
        if not _published(features):
            raise UserError(f"{error} Or plan without the pictures: give --rows N.") from None
        return (), str(error)


def _published(features: Features) -> int:
    """Number of images that a data set is published to have, by the share of its classes in the request; 0 of any other."""
    kind = str(features.source).partition(":")[0]
    images = PUBLISHED.get(f"{kind}-{features.split}", 0)
    if images and features.classes is not None:
        images = round(images * len(read_classes(features.classes)) / len(read_classes("imagenet")))
    return min(images, features.limit or images)


def stores_of(request: Request, rows: int, captions: int) -> list[Store]:
    """The arrays that an extraction leaves, in the order of docs/store-format.md."""
    features = request.features
    grid, channels = _encoder_output(features)
    codec, latent, stored = _latent(features)
    each = (rows, features.views)
    root = Path()
    folder = encoder_folder(root, features.encoder)
    arrays: list[tuple[Path, tuple[int, ...]]] = [
        (base_path(folder), (*each, *grid, base_channels(request, features.encoder, grid, channels)))
    ]
    arrays += [(level_path(folder, shape), (*each, *shape)) for shape in request.levels]
    arrays.append((z0_path(root, codec, latent), (*each, *latent[:2], stored)))
    if features.text is not None:
        arrays.append((text_path(root, *TEXT), (captions + 1, *TEXT)))
    arrays.append((labels_path(root), (rows,)))
    return [Store(path.as_posix(), shape) for path, shape in arrays]


def _encoder_output(features: Features) -> tuple[tuple[int, int], int]:
    """(H, W) and D of the encoder's map: of its weights, or as published where they are not on this machine."""
    kind, (_, _, variant) = kind_of(features.encoder), features.encoder.partition(":")
    try:
        encoder = describe_encoder(encoder_spec(features))
    except UserError:
        if variant not in kind.variants or features.model_args:
            raise
        h, w, channels = kind.variants[variant].output
        return (h, w), channels
    return encoder.grid, encoder.channels


def _latent(features: Features) -> tuple[str, tuple[int, int, int], int]:
    """(codec, (h, w, c) of z_0, stored channels): of its weights, or of the usual ones where they are not on this machine."""
    spec = codec_spec(features)
    try:
        codec = describe_codec(spec)
    except UserError:
        return (spec.name, *codec_kinds()[spec.name].usual_latent(spec.size))
    return codec.name, codec.latent_shape, codec.stored_channels


@dataclass(frozen=True)
class Speed:
    """What a trial of an extraction took, in seconds: to start, a picture in blocks and in all else (ledger, seals, levels), and
    a picture that the basis is fitted on; `once` is what else any number of pictures takes. `lasted` is the time of the blocks
    that were looked at."""

    workers: int
    pictures: int
    start: float
    block: float
    rest: float
    fit: float
    lasted: float
    once: float = 0.0

    @property
    def each(self) -> float:
        """Seconds a picture."""
        return self.block + self.rest

    def seconds(self, rows: int, fitted: int) -> float:
        """Of an extraction of so many pictures whose basis is fitted on so many."""
        return self.start + self.once + rows * self.each + fitted * self.fit

    def after(self, smaller: Speed) -> Speed:
        """This speed, given that of a smaller trial in the same process before: what both took alike is taken once, and the start
        is the first one's, which imported the libraries."""
        more = self.pictures - smaller.pictures
        before = smaller.rest * smaller.pictures + smaller.once
        rest = min(self.rest, max(0.0, self.rest * self.pictures - before) / more)
        once = (self.rest - rest) * self.pictures
        return replace(self, start=max(self.start, smaller.start), rest=rest, once=once)


def measured_speed(
    request: Request, rows: int, workers: int | None, scheduler: str | None, decoders: int | None = None
) -> Speed:
    """Extract some of the pictures, as `extract` would all `rows`, into a folder beside the store root that is removed again.

    First two blocks for each worker, then as many as should last TRIAL seconds.
    """
    workers = default_workers() if workers is None and scheduler is None else workers
    count = 2 * max(1, workers or 1) * INNER_BATCH
    smaller = None
    with _trial_folder(resolve_path(request.features.out)) as folder:
        while True:
            count = min(rows, count)
            root = folder / str(count)
            changes = {
                "out": str(root),
                "limit": count,
                "basis_rows": INNER_BATCH,
                "basis_tolerance": 1e9,
                "max_bad": "100%",
            }
            trial = request.model_copy(update={"features": request.features.model_copy(update=changes)})
            start = time.perf_counter()
            extract(trial, workers, scheduler, decoders=decoders)
            speed = _speed_of(log_path(root), count, time.perf_counter() - start)
            speed = speed if smaller is None else speed.after(smaller)
            if speed.lasted >= ENOUGH * TRIAL or count == rows:
                return speed
            smaller = speed
            count = max(2 * count, math.ceil(TRIAL / speed.block))


@contextmanager
def _trial_folder(root: Path) -> Iterator[Path]:
    """A folder beside a store root, which all workers reach; it is removed again."""
    beside = next(folder for folder in root.parents if folder.is_dir()) if is_local(root) else root.parent
    folder = beside / f".featurize-plan-{uuid.uuid4().hex[:12]}"
    if is_local(folder):
        folder.mkdir()
    try:
        yield folder
    finally:
        remove_folder(folder)


def _speed_of(journal: Path, pictures: int, wall: float) -> Speed:
    """The speed of a finished extraction, by its log."""
    events = [json.loads(line) for line in journal.read_text().splitlines()]
    moments = {event["event"]: _time(event) for event in events}  # the last of each
    blocks = [event for event in events if event["event"] == "block"]
    parts = [event for event in events if event["event"] == "basis part"]
    ends = sorted(map(_time, blocks))
    begins = [_time(block) - sum(block["seconds"].values()) for block in blocks]
    # Those that were begun before the first was done: by as many workers. The first of each is left out, as it is slower.
    workers = sum(begin < ends[0] for begin in begins)
    steady = sorted(blocks, key=_time)[workers:]
    all_blocks = ends[-1] - min(begins)
    lasted, done = (ends[-1] - ends[workers - 1], steady) if steady else (all_blocks, blocks)
    fitted = sum(part["pictures"] for part in parts)
    fitting = sum(sum(part["seconds"].values()) for part in parts)
    logged = moments["end"] - moments["start"]
    return Speed(
        workers,
        pictures,
        start=wall - logged,
        block=lasted / sum(block["pictures"] for block in done),
        rest=max(0.0, logged - all_blocks - fitting) / pictures,
        fit=fitting / fitted / workers if fitted else 0.0,
        lasted=lasted,
    )


def _time(event: dict[str, Any]) -> float:
    """When an event was logged, in seconds."""
    return datetime.fromisoformat(event["time"]).timestamp()


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"
