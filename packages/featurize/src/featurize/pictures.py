"""From the bytes of a picture file to the pixels that encoders and codecs see."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

Box = tuple[int, int, int, int]

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}


class BadPicture(Exception):
    """A picture that can't be decoded, with the reason for the ledger."""


def decode(data: bytes) -> Image.Image:
    """The whole picture as RGB, turned upright by its EXIF orientation.

    Grey, palette, CMYK, 16-bit and float pictures are converted; an alpha channel is dropped, as torchvision's loader
    does. Raises BadPicture for anything that is damaged, cut short, or so large that it must be a mistake.
    """
    if not data:
        raise BadPicture("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            if image.format == "PNG":
                # Pillow checks a PNG's checksums in verify() only, and the image can't be used after it.
                image.verify()
                image = Image.open(io.BytesIO(data))
            image.load()
            return _upright(_to_rgb(image))
    except (
        Exception
    ) as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error, DecompressionBombError...
        raise BadPicture(f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]) from None


def original_mode(data: bytes) -> str:
    """Pillow's mode of the picture before conversion, like `L` or `CMYK`."""
    with Image.open(io.BytesIO(data)) as image:
        return image.mode


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data says nothing about the pixels: Pillow raises SyntaxError, struct.error...
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling.
        grey = np.asarray(image).astype(np.float64) / 257.0
        converted = Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8))
    elif image.mode == "F":
        grey = np.nan_to_num(np.asarray(image, dtype=np.float64))
        scale = 255.0 if grey.max(initial=0.0) <= 1.0 else 1.0
        converted = Image.fromarray(np.clip(np.rint(grey * scale), 0, 255).astype(np.uint8))
    else:
        return image.convert("RGB")
    converted.info = image.info
    return converted.convert("RGB")


def square_box(width: int, height: int) -> Box:
    """The largest centred square: one crop for every encoder and codec, so that their grids see the same pixels."""
    side = min(width, height)
    left, upper = (width - side) // 2, (height - side) // 2
    return left, upper, left + side, upper + side


def crop(image: Image.Image, box: Box, size: int, interpolation: str) -> np.ndarray:
    """The box of a picture, resized with antialiasing to (size, size, 3) uint8."""
    if (box[2] - box[0], box[3] - box[1]) == (size, size):
        return np.asarray(image.crop(box))
    return np.asarray(image.resize((size, size), INTERPOLATIONS[interpolation], box=box, reducing_gap=None))
