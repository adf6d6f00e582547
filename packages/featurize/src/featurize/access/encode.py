"""Further images into the arrays of a store root: its crop, its encoder, its basis, its standardisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from featurize.access.root import StoreRoot, open_root
from featurize.basis.pooling import pool
from featurize.basis.svd import load_basis
from featurize.codecs import load_codec
from featurize.encoders import encode as encode_features
from featurize.encoders import load_encoder
from featurize.errors import UserError
from featurize.execution.devices import device_of_worker
from featurize.extraction.levels import level_task
from featurize.extraction.loader import INNER_BATCH
from featurize.extraction.networks import codec_spec, encoder_spec
from featurize.images.crop import CropRule, InputSpec, crop, parse_rule
from featurize.images.decode import Profile, decode, upright_rgb
from featurize.images.reasons import BadImage
from featurize.integrity.options import features_of
from featurize.recipe import Features
from featurize.store.layout import base_path, basis_path
from featurize.store.metadata import ArraySpec, spec_of

ImageLike = Image.Image | np.ndarray | str | Path
Encode = Callable[
    [np.ndarray], dict[str, np.ndarray]
]  # of INNER_BATCH images (B, side, side, 3) uint8: latents by name


@dataclass(frozen=True)
class Branch:
    """A network of a root: what it is given of an image, and the latents that it makes of a batch."""

    input: InputSpec
    features: Features
    encode: Encode


def encode(
    images: Sequence[ImageLike] | np.ndarray,
    root: StoreRoot | str | Path,
    *names: str,
    weights: str | Path | None = None,
    device: str | None = None,
) -> dict[str, np.ndarray]:
    """Latents of images in the arrays `names` of a store root; without names in all its levels above z_0.

    images   PIL images, files' paths, or uint8 arrays (h, w, 3) of any size; or one uint8 array (B, h, w, 3). A PIL image is
             made RGB and turned upright by its EXIF orientation, as its file would be
    root     a store root: its path, or what `featurize.open` gives
    names    as in `root.paths`: `4x4x16`, `tiny/base`, `pixels/32x32x3`
    weights  file of the encoder's weights, if it is not where it was when the root was made
    device   of the networks; the GPU by default, if there is one

    Returns for each name float32 (B, h, w, c), of the image and not its flip. An image of the root gets its row again, up to
    rounding. Raises TypeError and ValueError for what is no image, KeyError for an unknown name, and UserError for
    weights that are missing or not those of the root.
    """
    opened = root if isinstance(root, StoreRoot) else open_root(root)
    _check(images)
    where = device or device_of_worker()
    branches = list(_branches(opened, names or tuple(opened.levels), weights, where))
    rule = parse_rule(opened.ledger.crop)
    parts: list[dict[str, np.ndarray]] = []
    for start in range(0, len(images), INNER_BATCH):
        count = min(INNER_BATCH, len(images) - start)
        inputs = [np.zeros((INNER_BATCH, one.input.side, one.input.side, 3), dtype=np.uint8) for one in branches]
        for number in range(count):
            image = images[start + number]
            ways = {(one.features.icc, one.features.least_side) for one in branches}
            pixels = {way: _rgb(image, start + number, *way) for way in ways}
            for x_BHWC, branch in zip(inputs, branches, strict=True):
                way = branch.features.icc, branch.features.least_side
                x_BHWC[number] = crop(pixels[way], rule, branch.input)
        latents = [branch.encode(x_BHWC) for x_BHWC, branch in zip(inputs, branches, strict=True)]
        parts.append({name: values[:count] for made in latents for name, values in made.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _check(images: object) -> None:
    if isinstance(images, str | Path | Image.Image) or not isinstance(images, Sequence | np.ndarray):
        raise TypeError(f"images is a {type(images).__name__}; give a list of images, such as [image]")
    if not len(images):
        raise ValueError("images is empty; give at least one")


def _rgb(image: ImageLike, number: int, profile: Profile, least: int) -> Image.Image:
    """An image of whatever form as RGB."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"images[{number}] is {image.dtype} {image.shape}; give uint8 (h, w, 3)")
        return Image.fromarray(image)
    if not isinstance(image, str | Path | Image.Image):
        raise TypeError(f"images[{number}] is a {type(image).__name__}; give a PIL image, a path or a uint8 array")
    try:
        if isinstance(image, str | Path):
            return decode(Path(image).read_bytes(), profile, least)
        image.load()
        return upright_rgb(image, image, profile)
    except (BadImage, OSError) as error:
        raise ValueError(f"images[{number}], {image}, can't be read: {error}") from None


def _branches(root: StoreRoot, names: Sequence[str], weights: str | Path | None, device: str) -> Iterator[Branch]:
    """One for each codec and each encoder of the arrays."""
    if not names:
        raise UserError(f"{root.path} has no level above z_0; `featurize levels` derives one, or name an array.")
    specs = {name: spec_of(root.paths[root.full_name(name)]) for name in names}
    by_folder: dict[Path, dict[str, ArraySpec]] = {}
    for name, spec in specs.items():
        if spec.kind == "z0":
            yield _codec_branch(name, spec, device)
        else:
            by_folder.setdefault(spec.path.parent, {})[name] = spec
    for folder, of_encoder in by_folder.items():
        yield _encoder_branch(folder, of_encoder, weights, parse_rule(root.ledger.crop), device)


def _codec_branch(name: str, spec: ArraySpec, device: str) -> Branch:
    features = features_of(spec)
    codec = load_codec(replace(codec_spec(features), device=device))
    return Branch(codec.input, features, lambda x_BHWC: {name: codec.encode(x_BHWC).cpu().numpy()})


def _encoder_branch(
    folder: Path, specs: dict[str, ArraySpec], weights: str | Path | None, rule: CropRule, device: str
) -> Branch:
    base = spec_of(base_path(folder))
    if weights is not None:
        options = base.attributes["options"] | {"weights": str(weights)}
        base = replace(base, attributes=base.attributes | {"options": options})
    features = features_of(base)
    encoder = load_encoder(encoder_spec(features), device)
    basis = load_basis(basis_path(folder))

    def encode_batch(x_BHWC: np.ndarray) -> dict[str, np.ndarray]:
        f_BHWD = encode_features(encoder, x_BHWC, device, features.precision)
        f_BHWC = basis.project(f_BHWD, base.shape[-1]).cpu().numpy()
        f_BHWC = f_BHWC.astype(base.dtype)  # as it is stored: levels come from the store
        return {name: make(f_BHWC) for name, make in makers.items()}

    makers = {name: _as_base if spec.kind == "base" else partial(_as_level, spec) for name, spec in specs.items()}
    return Branch(InputSpec(rule.side(encoder.input_size), encoder.interpolation), features, encode_batch)


def _as_base(f_BHWC: np.ndarray) -> np.ndarray:
    return f_BHWC.astype(np.float32)


def _as_level(spec: ArraySpec, f_BHWC: np.ndarray) -> np.ndarray:
    """The level of the base store's values: pooled and standardised as its attributes say."""
    task = level_task(spec, 0)
    pooling = task.pooling
    pooled_BHWC = pool(f_BHWC[..., : pooling.channels], pooling.rows, pooling.columns)
    return ((pooled_BHWC - task.mean) / task.std).astype(np.float32)
