"""JPEGs decoded by nvJPEG, and images cropped and resized where they lie then: on a GPU."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from featurize.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

BITS = 22  # of a weight's fraction: Pillow resizes 8-bit images in whole numbers
FILTERS: dict[
    int, tuple[float, Callable[[np.ndarray], np.ndarray]]
] = {  # how far one reaches, in pixels, and its value there
    Image.Resampling.BOX: (0.5, lambda x: ((x > -0.5) & (x <= 0.5)).astype(np.float64)),
    Image.Resampling.BILINEAR: (1.0, lambda x: np.maximum(1 - np.abs(x), 0)),
    Image.Resampling.BICUBIC: (2.0, lambda x: _cubic(np.abs(x))),
    Image.Resampling.LANCZOS: (3.0, lambda x: np.where((x >= -3) & (x < 3), np.sinc(x) * np.sinc(x / 3), 0.0)),
}


@dataclass(frozen=True)
class DeviceImage:
    """An RGB image x_CHW uint8 on a device, with the methods of Pillow's images that `images.crop` needs.

    They give Pillow's very bytes, on every device: products of whole numbers below 2**53 are exact in float64.
    """

    x_CHW: Tensor

    @property
    def width(self) -> int:
        return self.x_CHW.shape[2]

    @property
    def height(self) -> int:
        return self.x_CHW.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.width, self.height

    def crop(self, box: tuple[float, float, float, float]) -> DeviceImage:
        """The pixels within a box whose corners lie between pixels."""
        left, upper, right, lower = map(int, box)
        return DeviceImage(self.x_CHW[:, upper:lower, left:right])

    def resize(
        self, size: tuple[int, int], resample: int, box: tuple[float, float, float, float] | None = None
    ) -> DeviceImage:
        """The box (the whole without one), resized by one of FILTERS: across first, then down."""
        left, upper, right, lower = box or (0, 0, *self.size)
        x_CHW, device = self.x_CHW, str(self.x_CHW.device)
        if (size[0], left, right) != (self.width, 0, self.width):
            weights = _weights(self.width, left, right, size[0], resample, device)
            x_CHW = _to_bytes(x_CHW.double() @ weights.T)
        if (size[1], upper, lower) != (self.height, 0, self.height):
            weights = _weights(self.height, upper, lower, size[1], resample, device)
            x_CHW = _to_bytes(weights @ x_CHW.double())
        return DeviceImage(x_CHW)


@cache
def require_nvjpeg(device: str) -> None:
    """Raises UserError where nvJPEG can't decode on a device."""
    if not device.startswith("cuda"):
        raise UserError("--decoder nvjpeg decodes on an NVIDIA GPU, and there is none here; use --decoder pillow.")
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    try:
        _decode([_as_tensor(file.getvalue())], device)
    except RuntimeError as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise UserError(
            f"--decoder nvjpeg does not work with the torchvision that is installed ({reason}); use --decoder pillow, or "
            "install torchvision's build for CUDA."
        ) from None


def decode_on_device(files: Sequence[np.ndarray | bytes], device: str) -> list[DeviceImage | None]:
    """The image of each JPEG; None for one that nvJPEG refuses. Raises UserError where there is no nvJPEG."""
    import torch

    require_nvjpeg(device)
    tensors = [_as_tensor(file) for file in files]
    try:
        return list(map(DeviceImage, _decode(tensors, device)))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # no word on which of them it was
        return [None] if len(files) == 1 else [decode_on_device([file], device)[0] for file in files]


def _decode(files: list[Tensor], device: str) -> list[Tensor]:
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(files, ImageReadMode.RGB, device)


def _as_tensor(file: np.ndarray | bytes) -> Tensor:
    """The bytes, where they are if they may be written there, as torch wants it."""
    import torch

    return torch.from_numpy(np.frombuffer(bytearray(file), dtype=np.uint8) if isinstance(file, bytes) else file)


@lru_cache(maxsize=256)  # of images of the same size; 1 MB each
def _weights(pixels: int, start: float, end: float, out: int, resample: int, device: str) -> Tensor:
    """What each of `pixels` counts for each of `out` that the span from `start` to `end` is resized to, float64
    (out, pixels), in units of 2**-BITS: those of Pillow's `precompute_coeffs`."""
    import torch

    support, value = FILTERS[resample]
    first, last = np.float32(start), np.float32(end)
    scale = float(last - first) / out
    stretch = max(1.0, scale)
    centre = float(first) + (np.arange(out)[:, None] + 0.5) * scale
    at = np.arange(pixels)
    reached = (at >= np.trunc(centre - support * stretch + 0.5)) & (at < np.trunc(centre + support * stretch + 0.5))
    weights = np.where(reached, value((at - centre + 0.5) * (1 / stretch)), 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    return torch.from_numpy(np.trunc(weights * 2**BITS + np.copysign(0.5, weights))).to(device)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution with a = -1/2, of distances."""
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _to_bytes(x: Tensor) -> Tensor:
    """Sums in units of 2**-BITS, rounded as Pillow does."""
    import torch

    return x.add_(2 ** (BITS - 1)).mul_(2.0**-BITS).floor_().clamp_(0, 255).to(torch.uint8)
