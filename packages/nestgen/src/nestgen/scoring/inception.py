"""The Inception network whose features make an FID, through torch-fidelity.

There are two ways of an image into it, whose features differ by about 1e-3: TensorFlow 1's, which is that of the first
FIDs and of torch-fidelity, and pytorch-fid's, which is U-ViT's. FIDs of one are not to be compared with those of the other.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from nestgen.cores import cores
from nestgen.errors import UserError
from nestgen.files import atomic_write, sha256_of
from nestgen.recipe.protocols import Inception
from nestgen.sampling.descent import default_device
from nestgen.scoring.frechet import Gaussian, gaussian_of_moments

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity names what it downloads
ADDRESS = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
TIMEOUT = 30  # seconds without a byte
SIDE = 299  # of the images that it takes
ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
BATCH = 32

# Features (B, 2048) of uint8 images (B, height, width, 3).
Features = Callable[[np.ndarray], np.ndarray]


def find_weights(file: Path | None) -> Path:
    """The weights' file: `file`, else the published one in torch's cache, fetched when it is not there yet.

    Raises UserError where `file` or torch-fidelity is not there, and where the published file cannot be fetched or is another.
    """
    if file is not None and not file.is_file():
        raise UserError(f"there are no Inception weights {file}; they are {ADDRESS}")
    if not importlib.util.find_spec("torch_fidelity"):
        raise UserError("an FID needs torch-fidelity; run `pip install torch-fidelity`")
    if file is not None:
        return file
    cached = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
    if not cached.is_file():
        _fetch(cached)
    if (digest := sha256_of(cached)) != SHA256:
        raise UserError(
            f"{cached} is not the published file (its SHA-256 is {digest}); remove it, and it is fetched again"
        )
    return cached


def _fetch(cached: Path) -> None:
    """Downloads the published file; it appears whole and with the right digest, or not at all."""
    digest = hashlib.sha256()
    cached.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            urllib.request.urlopen(ADDRESS, timeout=TIMEOUT) as answer,
            atomic_write(cached) as part,
            part.open("wb") as out,
        ):
            size = int(answer.headers.get("Content-Length") or 0) or None
            with tqdm(total=size, desc=f"fetching {WEIGHTS}", unit="B", unit_scale=True) as progress:
                while piece := answer.read(1 << 20):
                    digest.update(piece)
                    out.write(piece)
                    progress.update(len(piece))
            if digest.hexdigest() != SHA256:
                raise UserError(
                    f"{ADDRESS} gave a file with the SHA-256 {digest.hexdigest()}, not {SHA256}; it is not kept"
                )
    except (OSError, HTTPException) as error:
        raise UserError(
            f"an FID needs Inception's weights, which cannot be fetched ({getattr(error, 'reason', None) or error}); copy "
            f"{ADDRESS} to {cached}, or name the file with --inception"
        ) from None


def load_inception(weights: Path, kind: Inception) -> Features:
    """The network with its way in. Raises UserError for a file that does not hold it.

    `tensorflow` is torch-fidelity's: TensorFlow 1's bilinear resize of pixels 0..255 to 299 x 299, whose corners are
    those of the image, then (p - 128) / 128. `pytorch-fid` is `pytorch_fid_input`.
    """
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
    layers = nn.Sequential(*list(network.children())[:-1])  # its forward's, in order, up to the features

    @torch.inference_mode()
    def features(images_BHWC: np.ndarray) -> np.ndarray:
        images_BCHW = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).to(device)
        if kind == "pytorch-fid":
            return layers(pytorch_fid_input(images_BCHW)).flatten(1).cpu().numpy()
        return network(images_BCHW)[0].cpu().numpy()

    return features


def pytorch_fid_input(images_BCHW: Tensor) -> Tensor:
    """What pytorch-fid gives the network of uint8 images: bilinear to (B, 3, 299, 299) with half-pixel centres and
    without antialias, and 0..255 scaled to -1..1.
    """
    unit_BCHW = images_BCHW.float() / 255
    return 2 * F.interpolate(unit_BCHW, size=(SIDE, SIDE), mode="bilinear", align_corners=False) - 1


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
    with ThreadPoolExecutor(cores()) as pool:  # a GPU would wait for one thread that decodes
        for first in tqdm(range(0, len(paths), BATCH), desc=f"Inception, {folder.name}", unit=" batches"):
            images = list(pool.map(partial(_read, side=side), paths[first : first + BATCH]))
            if any(image.shape != images[0].shape for image in images):
                raise UserError(f"{folder} holds images of different sizes")
            parts.append(features(np.stack(images)))
    return np.concatenate(parts)


def _read(path: Path, *, side: int | None) -> np.ndarray:
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
