"""What an extraction will take, before it starts: rows, bytes of each store, hours at a given or a measured rate."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from featurize.codecs import describe_codec, load_codec
from featurize.codecs import kinds as codec_kinds
from featurize.encoders import describe_encoder, encode, kind_of, load_encoder
from featurize.errors import UserError
from featurize.execution.devices import device_of_worker
from featurize.extraction.loader import INNER_BATCH
from featurize.extraction.networks import codec_spec, encoder_spec
from featurize.extraction.targets import base_channels, crop_rule
from featurize.images.crop import InputSpec, crop
from featurize.images.decode import decode
from featurize.recipe import Features, Request
from featurize.sources import SourceImage, list_images, read
from featurize.sources.class_lists import read_classes
from featurize.sources.coco import COUNTS
from featurize.store.layout import base_path, encoder_folder, labels_path, level_path, text_path, z0_path

HALF = 2  # bytes of a float16
TEXT = (77, 768)  # tokens and width of CLIP ViT-L/14's text tower
PUBLISHED = {"imagenet-train": 1_281_167, "imagenet-val": 50_000} | {
    f"coco{name[-4:]}-{name[:-4]}": pictures for name, pictures in COUNTS.items()
}  # pictures by source and split, for plans where they are not at hand
MEASURED = 64  # images, after as many to warm up


@dataclass(frozen=True)
class Store:
    """One array: its name in the store root and its shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Uncompressed, as stores are: float16, or int64 for a vector of labels."""
        return math.prod(self.shape) * (8 if len(self.shape) == 1 else HALF)


def estimate(request: Request, rows: int | None, rate: float | None, measure: bool) -> str:
    """The text of `featurize plan`. Nothing is written; with `measure`, weights are loaded and some pictures encoded.

    `rows` stands in for the pictures of a source that is not here, `rate` is pictures a second. ImageNet's and COCO's
    published numbers are taken where neither is given. Raises UserError where the number of images can't be found out,
    and for levels that the encoder can't give.
    """
    features = request.features
    images, why_not = _images(features) if rows is None else ((), None)
    if rows is None:
        rows = len(images) or _published(features)
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
        rate = measured_rate(features, images)
        lines.append(f"measured here, in one process: {rate:.3g} pictures/s")
    if rate is None:
        lines.append("hours: give --rate PICTURES_A_SECOND, or --measure to encode some of them")
    else:
        encoded = rows + min(features.basis_rows, rows) * (features.basis is None)
        lines.append(
            f"hours: {encoded / rate / 3600:.3g} at {rate:.4g} pictures/s ({encoded:,} pictures are encoded, "
            f"{encoded - rows:,} of them first for the basis)"
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


def measured_rate(features: Features, images: tuple[SourceImage, ...]) -> float:
    """Images a second through reading, decoding, encoder and codec, in this process alone."""

    device = device_of_worker()
    encoder, codec = load_encoder(encoder_spec(features), device), load_codec(codec_spec(features))
    rule = crop_rule(features, encoder)
    networks = (
        (
            InputSpec(rule.side(encoder.input_size), encoder.interpolation),
            lambda x: encode(encoder, x, device, features.precision).cpu(),
        ),
        (codec.input, codec.encode),
    )

    def one_pass() -> int:
        chosen = iter(images[:MEASURED])
        done = 0
        while part := list(islice(chosen, INNER_BATCH)):
            decoded = [decode(read(image), features.icc) for image in part]
            for spec, network in networks:
                x_BHWC = np.stack([crop(image, rule, spec) for image in decoded])
                for view in range(features.views):
                    network(x_BHWC if not view else np.ascontiguousarray(x_BHWC[:, :, ::-1]))
            done += len(part)
        return done

    one_pass()
    start = time.perf_counter()
    return one_pass() / (time.perf_counter() - start)


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"
