"""Spaces that need the images themselves again: raw pixels, and the encoder's features before the basis."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from featurize.encoders import encode, load_encoder
from featurize.errors import UserError
from featurize.execution.devices import device_of_worker
from featurize.extraction.networks import encoder_spec
from featurize.images.crop import InputSpec, crop, parse_rule
from featurize.images.decode import Profile, decode
from featurize.neighbours.spaces import PIXEL_SIDE, FileSpace
from featurize.recipe import Features
from featurize.sources import read
from featurize.store.layout import base_path, encoder_folder
from featurize.store.ledger import Ledger
from featurize.store.read import read_sealed_metadata

BATCH = 32


def thumbnail(
    ledger: Ledger, row: int, side: int, interpolation: str = "bicubic", icc: Profile = "ignore", least: int = 0
) -> np.ndarray:
    """The crop of a stored row that its encoder saw, uint8 (side, side, 3)."""
    image = decode(read(ledger.images[row]), icc, least)
    return crop(image, parse_rule(ledger.crop), InputSpec(side, interpolation))


def raw_pixels(ledger: Ledger, rows: np.ndarray, folder: Path) -> FileSpace:
    """The crops of the rows, PIXEL_SIDE pixels a side, less their mean, in a file of `folder`."""
    path = folder / "pixels.npy"
    pixels = np.lib.format.open_memmap(path, "w+", np.float32, (len(rows), PIXEL_SIDE * PIXEL_SIDE * 3))
    for start, crops in _crops(ledger, rows, (PIXEL_SIDE, "bicubic", "ignore", 0), "reading pixels"):
        flat = crops.reshape(len(crops), -1).astype(np.float32)
        pixels[start : start + len(flat)] = flat - flat.mean(axis=1, keepdims=True)
    pixels.flush()
    return FileSpace("raw pixels", "pictures", path)


def raw_features(root: Path, ledger: Ledger, features: Features, rows: np.ndarray, folder: Path) -> FileSpace:
    """The mean over positions of the encoder's features as it gives them: all its channels, no basis, not centred.

    Raises UserError when the encoder is not the very one that made the store.
    """
    device = device_of_worker()
    encoder = load_encoder(encoder_spec(features), device)
    base = base_path(encoder_folder(root, features.encoder))
    attributes = read_sealed_metadata(base).attributes
    stored, identity = attributes["provenance"]["encoder"], encoder.identity
    if identity != stored:
        keys = sorted(key for key in identity.keys() | stored.keys() if identity.get(key) != stored.get(key))
        raise UserError(
            f"{base} was made with another {features.encoder} (differs in: {', '.join(keys)}); "
            "give the weights and options that it was extracted with."
        )
    path = folder / "features.npy"
    means = np.lib.format.open_memmap(path, "w+", np.float32, (len(rows), encoder.channels))
    made = Features(out="", **attributes["options"])
    how = parse_rule(ledger.crop).side(encoder.input_size), encoder.interpolation, made.icc, made.least_side
    for start, x_BHWC in _crops(ledger, rows, how, "encoding again"):
        f_BHWD = encode(encoder, x_BHWC, device, features.precision)
        means[start : start + len(f_BHWD)] = f_BHWD.mean(dim=(1, 2)).cpu().numpy()
    means.flush()
    return FileSpace("raw features", features.encoder, path)


def _crops(
    ledger: Ledger, rows: np.ndarray, how: tuple[int, str, Profile, int], task: str
) -> Iterator[tuple[int, np.ndarray]]:
    """(first position, crops) in batches, made as `thumbnail` is told by `how`. Pillow decodes without the interpreter's lock, so
    threads help."""
    with ThreadPoolExecutor(4) as pool, tqdm(total=len(rows), desc=task, unit=" pictures", delay=2) as progress:
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            yield (
                start,
                np.stack(list(pool.map(lambda row: thumbnail(ledger, int(row), *how), part))),
            )
            progress.update(len(part))
