"""What an extraction will take, before it starts: rows, bytes of each store, hours at a given or a measured rate."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import islice

from featurize.errors import UserError
from featurize.extraction.cards import EncoderCard, known_cards
from featurize.extraction.targets import base_channels
from featurize.recipe import Features, Request
from featurize.sources import SourceImage, list_images, read
from featurize.sources.class_lists import read_classes
from featurize.sources.coco import COUNTS
from featurize.store.store import folder_name

HALF = 2  # bytes of a float16
PUBLISHED = {"imagenet-train": 1_281_167, "imagenet-val": 50_000} | {
    f"coco{name[-4:]}-{name[:-4]}": pictures for name, pictures in COUNTS.items()
}  # pictures by source and split, for plans where they are not at hand
MEASURED = 64  # pictures, after as many to warm up


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
    published numbers are taken where neither is given. Raises UserError where nobody knows how many pictures there are,
    and for levels that the encoder can't give.
    """
    features = request.features
    pictures, told = _pictures(features) if rows is None else ((), None)
    if rows is None:
        rows = len(pictures) or _published(features)
    captions = sum(len(picture.captions) for picture in pictures) if pictures else 5 * rows
    stores = stores_of(request, rows, captions)
    lines = [
        f"{rows:,} pictures of {features.source or 'an unnamed source'}, {features.views} view(s), into {features.out}",
        *([f"  (so many are published; these can't be counted: {told})"] if told else []),
    ]
    wide = max(len(store.name) for store in stores)
    for store in stores:
        lines.append(f"  {store.name:<{wide}}  {'x'.join(map(str, store.shape)):<24} {_size(store.bytes):>9}")
    lines.append(f"  {'together':<{wide}}  {'':<24} {_size(sum(store.bytes for store in stores)):>9}")
    if measure:
        if not pictures:
            raise UserError("--measure needs the pictures; leave --rows out.")
        rate = measured_rate(features, pictures)
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


def _pictures(features: Features) -> tuple[tuple[SourceImage, ...], str | None]:
    """The source's pictures; or none and why, where it is not here but published. Raises UserError where it is neither."""
    if features.source is None:
        raise UserError("How many pictures? Give --rows N, or a recipe with features.source.")
    try:
        return list_images(features.source, features.split, features.limit, features.classes).images, None
    except UserError as error:
        if not _published(features):
            raise UserError(f"{error} Or plan without the pictures: give --rows N.") from None
        return (), str(error)


def _published(features: Features) -> int:
    """Pictures that a data set is published to have, by the share of its classes that are asked for; 0 of any other."""
    kind = str(features.source).partition(":")[0]
    pictures = PUBLISHED.get(f"{kind}-{features.split}", 0)
    if pictures and features.classes is not None:
        pictures = round(pictures * len(read_classes(features.classes)) / len(read_classes("imagenet")))
    return min(pictures, features.limit or pictures)


def stores_of(request: Request, rows: int, captions: int) -> list[Store]:
    """The arrays that an extraction leaves, in the order of docs/store-format.md."""
    features = request.features
    encoder, (codec, latent, stored) = _encoder(features), _latent(features)
    each = (rows, features.views)
    folder = folder_name(features.encoder)
    stores = [Store(f"{folder}/base.zarr", (*each, *encoder.grid, base_channels(request, encoder)))]
    stores += [Store(f"{folder}/{'x'.join(map(str, shape))}.zarr", (*each, *shape)) for shape in request.levels]
    stores.append(Store(f"{codec}/{'x'.join(map(str, latent))}.zarr", (*each, *latent[:2], stored)))
    if features.text is not None:
        stores.append(Store("text/77x768.zarr", (captions + 1, 77, 768)))
    return [*stores, Store("labels.zarr", (rows,))]


def _encoder(features: Features) -> EncoderCard:
    """The encoder's map: from an earlier run with it, from the registry, or by loading it."""
    if (cards := known_cards(features)) is not None:
        return cards.encoder
    from featurize.encoders import kinds, known_names, load_encoder
    from featurize.extraction.block import encoder_spec

    name, _, variant = features.encoder.partition(":")
    kind = kinds().get(name)
    if kind is None:
        raise UserError(f"There is no encoder '{features.encoder}'; known are {', '.join(known_names())}.")
    if variant in kind.variants and not features.model_args:
        h, w, d = kind.variants[variant].output
        return EncoderCard(features.encoder, (h, w), d, {}, None)
    encoder = load_encoder(encoder_spec(features), "cpu")
    return EncoderCard(encoder.name, encoder.grid, encoder.channels, {}, None)


def _latent(features: Features) -> tuple[str, tuple[int, int, int], int]:
    """(codec, (h, w, c) of z_0, stored channels): pixels, or Stable Diffusion's VAE where no other is at hand."""
    if (cards := known_cards(features)) is not None:
        return cards.codec.name, cards.codec.latent_shape, cards.codec.stored_channels
    from featurize.extraction.block import codec_spec

    spec = codec_spec(features)
    if spec.name == "pixels" or spec.weights == "tiny":
        from featurize.codecs import load_codec

        codec = load_codec(spec)
        return codec.name, codec.latent_shape, codec.stored_channels
    side = spec.size // 8
    return spec.name, (side, side, 4), 8 if spec.name == "vae" else 4


def measured_rate(features: Features, pictures: tuple[SourceImage, ...]) -> float:
    """Pictures a second through reading, decoding, encoder and codec, in this process alone."""
    import numpy as np

    from featurize.codecs import load_codec
    from featurize.encoders import encode, load_encoder
    from featurize.execution.engine import device_of_worker
    from featurize.extraction.block import INNER_BATCH, codec_spec, encoder_spec
    from featurize.images.crop import crop, square_box
    from featurize.images.decode import decode

    device = device_of_worker()
    encoder, codec = load_encoder(encoder_spec(features), device), load_codec(codec_spec(features))

    def one_pass() -> int:
        chosen = iter(pictures[:MEASURED])
        done = 0
        while part := list(islice(chosen, INNER_BATCH)):
            images = [decode(read(picture)) for picture in part]
            boxes = [square_box(*image.size) for image in images]
            for size, interpolation, network in (
                (
                    encoder.input_size,
                    encoder.interpolation,
                    lambda x: encode(encoder, x, device, features.precision).cpu(),
                ),
                (codec.size, codec.interpolation, codec.encode),
            ):
                x_BHWC = np.stack([crop(image, box, size, interpolation) for image, box in zip(images, boxes)])
                for view in range(features.views):
                    network(x_BHWC if not view else np.ascontiguousarray(x_BHWC[:, :, ::-1]))
            done += len(part)
        return done

    one_pass()
    begun = time.perf_counter()
    return one_pass() / (time.perf_counter() - begun)


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"
