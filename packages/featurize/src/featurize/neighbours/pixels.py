"""Spaces that need the images themselves again: raw pixels, and the encoder's features before the basis."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from featurize.encoders import encode, load_encoder
from featurize.errors import UserError
from featurize.execution.devices import device_of_worker
from featurize.extraction.networks import encoder_spec
from featurize.extraction.reading import Reader, load_crops_of, readers
from featurize.images.crop import InputSpec, parse_rule
from featurize.images.decode import Profile
from featurize.neighbours.spaces import PIXEL_SIDE, FileSpace
from featurize.recipe import Features
from featurize.sources import SourceImage
from featurize.store.layout import base_path, encoder_folder
from featurize.store.ledger import Ledger
from featurize.store.metadata import existing_metadata
from featurize.store.read import read_sealed_metadata

BATCH = 32


def profile_of(base: Path) -> Profile:
    """What was done with the colour profiles of a base store's images."""
    metadata = existing_metadata(base)
    return "ignore" if metadata is None else metadata.attributes["provenance"].get("icc", "ignore")


def thumbnail(ledger: Ledger, row: int, side: int, icc: Profile) -> np.ndarray:
    """The crop of a stored row that its encoder saw, uint8 (side, side, 3). Raises UserError as `_load_crops` does."""
    return _load_crops(ledger, [row], InputSpec(side, "bicubic"), icc)[0]


def raw_pixels(ledger: Ledger, rows: np.ndarray, icc: Profile, folder: Path) -> FileSpace:
    """The crops of the rows, PIXEL_SIDE pixels a side, less their mean, in a file of `folder`."""
    path = folder / "pixels.npy"
    pixels = np.lib.format.open_memmap(path, "w+", np.float32, (len(rows), PIXEL_SIDE * PIXEL_SIDE * 3))
    for start, crops in _batches(ledger, rows, InputSpec(PIXEL_SIDE, "bicubic"), icc, 0, "reading pixels"):
        flat = crops.reshape(len(crops), -1).astype(np.float32)
        pixels[start : start + len(flat)] = flat - flat.mean(axis=1, keepdims=True)
    pixels.flush()
    return FileSpace("raw pixels", "pictures", path)


def raw_features(
    root: Path, encoder_name: str, options: dict[str, Any], ledger: Ledger, rows: np.ndarray, folder: Path
) -> FileSpace:
    """The mean over positions of the encoder's features as it gives them: all its channels, no basis, not centred.

    The encoder has the options that it was extracted with, and `options` over them. Raises UserError when it is not the very
    one that made the store.
    """
    device = device_of_worker()
    base = base_path(encoder_folder(root, encoder_name))
    attributes = read_sealed_metadata(base).attributes
    features = Features(out="", **attributes["options"] | options)
    encoder = load_encoder(encoder_spec(features), device)
    stored, identity = attributes["provenance"]["encoder"], encoder.identity
    if identity != stored:
        keys = sorted(key for key in identity.keys() | stored.keys() if identity.get(key) != stored.get(key))
        raise UserError(
            f"{base} was made with another {encoder_name} (differs in: {', '.join(keys)}); "
            "give the weights and options that it was extracted with."
        )
    path = folder / "features.npy"
    means = np.lib.format.open_memmap(path, "w+", np.float32, (len(rows), encoder.channels))
    spec = InputSpec(parse_rule(ledger.crop).side(encoder.input_size), encoder.interpolation)
    for start, x_BHWC in _batches(ledger, rows, spec, features.icc, features.least_side, "encoding again"):
        f_BHWD = encode(encoder, x_BHWC, device, features.precision)
        means[start : start + len(f_BHWD)] = f_BHWD.mean(dim=(1, 2)).cpu().numpy()
    means.flush()
    return FileSpace("raw features", encoder_name, path)


def _batches(
    ledger: Ledger, rows: np.ndarray, spec: InputSpec, icc: Profile, least: int, task: str
) -> Iterator[tuple[int, np.ndarray]]:
    """(first position, crops) in batches. Pillow decodes without the interpreter's lock, so threads help."""
    with ThreadPoolExecutor(4) as pool, tqdm(total=len(rows), desc=task, unit=" pictures", delay=2) as progress:
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH].tolist()
            yield start, np.stack(_load_crops(ledger, part, spec, icc, least, pool.map))
            progress.update(len(part))


def _load_crops(
    ledger: Ledger,
    rows: Sequence[int],
    spec: InputSpec,
    icc: Profile,
    least: int = 0,
    map_: Callable[..., Iterable[np.ndarray]] = map,
) -> list[np.ndarray]:
    """What a network that takes `spec` sees of each row, uint8 (side, side, 3), read from its source again.

    Raises UserError for an image that is gone, or is another than it was.
    """
    images, digests = ledger.part(list(rows))
    rule = parse_rule(ledger.crop)

    def load(reader: Reader, image: SourceImage, digest: str) -> np.ndarray:
        crops, *_ = load_crops_of(image, reader, digest, rule, (spec,), icc, least)
        return np.asarray(crops[0])

    # The readers first, as what comes first is read to its end: what is still being read is given up before it.
    return list(map_(load, readers(images, [True] * len(images)), images, digests))
