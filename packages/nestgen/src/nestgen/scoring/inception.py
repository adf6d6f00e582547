"""The Inception network whose features make an FID, through torch-fidelity."""

from __future__ import annotations

import hashlib
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
from nestgen.sampling.descent import default_device
from nestgen.scoring.frechet import Gaussian, gaussian_of_moments

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity names what it downloads
ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
BATCH = 32

# Features (B, 2048) of uint8 images (B, height, width, 3).
Features = Callable[[np.ndarray], np.ndarray]


def find_weights(file: Path | None) -> Path | None:
    """The weights' file: `file`, else that in torch's cache, else None.

    Raises UserError where `file` is given and it or torch-fidelity is not there.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
    if file is None:
        return cached if cached.is_file() and importlib.util.find_spec("torch_fidelity") else None
    if not file.is_file():
        raise UserError(f"there are no Inception weights {file}; they are {WEIGHTS} of torch-fidelity's releases")
    if not importlib.util.find_spec("torch_fidelity"):
        raise UserError("an FID needs torch-fidelity; run `pip install torch-fidelity`")
    return file


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
    device = default_device()
    network = network.to(device)

    @torch.inference_mode()
    def features(images_BHWC: np.ndarray) -> np.ndarray:
        return network(torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).to(device))[0].cpu().numpy()

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


def folder_features(folder: Path, features: Features, side: int | None = None) -> np.ndarray:
    """Features (N, 2048) of the images directly in a folder, in the order of their names.

    With `side`, images of another size are cropped to their central square and resized to it by Lanczos, as U-ViT
    does. Raises UserError for a folder without images, and for one that cannot be read.
    """
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS) if folder.is_dir() else []
    if not paths:
        raise UserError(f"{folder} has no images ({', '.join(sorted(ENDINGS))})")
    parts = []
    for first in tqdm(range(0, len(paths), BATCH), desc=f"Inception, {folder.name}", unit=" batches"):
        images = [_read(path, side) for path in paths[first : first + BATCH]]
        if any(image.shape != images[0].shape for image in images):
            raise UserError(f"{folder} holds images of different sizes")
        parts.append(features(np.stack(images)))
    return np.concatenate(parts)


def _read(path: Path, side: int | None) -> np.ndarray:
    try:
        with Image.open(path) as file:
            file.verify()  # the checksums of a PNG, which decoding does not look at
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, ValueError, SyntaxError):
        raise UserError(f"{path} cannot be read as an image; replace or remove it") from None
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
            return gaussian_of_moments(arrays["mu"], arrays["sigma"])
    except (OSError, ValueError, KeyError, np.linalg.LinAlgError) as error:
        raise UserError(f"{file} is not an .npz with arrays mu and sigma ({type(error).__name__})") from None


def digest_of(images: Path) -> str:
    """SHA-256 of an .npz; of a folder, over the names and SHA-256 of its images."""
    if images.is_file():
        return sha256_of(images)
    lines = [f"{path.name} {sha256_of(path)}\n" for path in sorted(images.iterdir()) if path.suffix.lower() in ENDINGS]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
