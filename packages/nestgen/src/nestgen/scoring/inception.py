"""The Inception network whose features make an FID, through torch-fidelity (the extra `nestgen[fid]`)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from nestgen.errors import UserError
from nestgen.files import sha256_of
from nestgen.scoring.frechet import Gaussian, of_moments

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity names what it downloads
ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
BATCH = 32

# Features (B, 2048) of uint8 pictures (B, height, width, 3).
Features = Callable[[np.ndarray], np.ndarray]


def find_weights(named: Path | None) -> Path | None:
    """The weights' file: the one named, else that in torch's cache, else None.

    Raises UserError where one is named and it or torch-fidelity is not there.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
    if named is None:
        return cached if cached.is_file() and importlib.util.find_spec("torch_fidelity") else None
    if not named.is_file():
        raise UserError(f"there are no Inception weights {named}; they are {WEIGHTS} of torch-fidelity's releases")
    if not importlib.util.find_spec("torch_fidelity"):
        raise UserError("an FID needs torch-fidelity; install it with `pip install nestgen[fid]`")
    return named


def load_inception(weights: Path) -> Features:
    """The network. Raises UserError for a file that does not hold it."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        with _weights_only():
            network: Any = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
            )
    except (OSError, RuntimeError, TypeError, AttributeError, UnpicklingError, EOFError) as error:
        raise UserError(
            f"{weights} does not hold Inception's weights ({type(error).__name__}); they are {WEIGHTS} of "
            "torch-fidelity's releases"
        ) from None
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network.to(place)

    @torch.inference_mode()
    def features(pictures_BHWC: np.ndarray) -> np.ndarray:
        return network(torch.from_numpy(pictures_BHWC).permute(0, 3, 1, 2).to(place))[0].cpu().numpy()

    return features


@contextmanager
def _weights_only() -> Iterator[None]:
    """Within it torch.load runs no code of a pickle, even though torch-fidelity asks it to."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def features_of(folder: Path, features: Features, side: int | None = None) -> np.ndarray:
    """Features (N, 2048) of the pictures directly in a folder, in the order of their names.

    With `side`, pictures of another size are cropped to their central square and resized to it by Lanczos, as U-ViT
    does. Raises UserError for a folder without pictures, and for one that cannot be read.
    """
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS) if folder.is_dir() else []
    if not paths:
        raise UserError(f"{folder} has no pictures ({', '.join(sorted(ENDINGS))})")
    parts = []
    for first in tqdm(range(0, len(paths), BATCH), desc=f"Inception, {folder.name}", unit=" batches"):
        pictures = [_read(path, side) for path in paths[first : first + BATCH]]
        if any(picture.shape != pictures[0].shape for picture in pictures):
            raise UserError(f"{folder} holds pictures of different sizes")
        parts.append(features(np.stack(pictures)))
    return np.concatenate(parts)


def _read(path: Path, side: int | None) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            image = picture.convert("RGB")
    except (OSError, ValueError):
        raise UserError(f"{path} cannot be read as a picture; mend or remove it") from None
    if side is not None and image.size != (side, side):
        short = min(image.size)
        left, upper = (image.width - short) // 2, (image.height - short) // 2
        square = image.crop((left, upper, left + short, upper + short))
        image = square.resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image)


def published_moments(file: Path) -> Gaussian:
    """The Gaussian in an .npz of `mu` and `sigma`, as ADM, pytorch-fid and U-ViT publish them."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return of_moments(arrays["mu"], arrays["sigma"])
    except (OSError, ValueError, KeyError, np.linalg.LinAlgError) as error:
        raise UserError(f"{file} is no .npz with arrays mu and sigma ({type(error).__name__})") from None


def digest_of(pictures: Path) -> str:
    """Of an .npz its own; of a folder one over the names and digests of its pictures."""
    if pictures.is_file():
        return sha256_of(pictures)
    import hashlib

    lines = [
        f"{path.name} {sha256_of(path)}\n" for path in sorted(pictures.iterdir()) if path.suffix.lower() in ENDINGS
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
