"""From the bytes of an image file to an upright RGB image."""

from __future__ import annotations

import io
import warnings
from contextlib import suppress
from functools import cache

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Pillow has further formats; some of them run other programs (EPS) or are not used by data sets.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# Where Pillow begins to warn of bombs. An image of this size needs about a gigabyte: 4 bytes a pixel, thrice at most.
MAX_PIXELS = 89_478_485

# Odd metadata does not matter to a run over a million images. Set once, because catch_warnings is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImage(Exception):
    """An image that can't be decoded, with the reason for the ledger."""


def decode(data: bytes) -> Image.Image:
    """The whole image as RGB, turned upright by its EXIF orientation; the first frame of an animation.

    Grey, palette, CMYK, YCCK, 16-bit and float images are converted; an alpha channel is dropped, as torchvision's
    loader does. From 16-bit colour Pillow takes the high byte, which is at most 1/255 below the rounded value. Raises
    BadImage for anything that is damaged, cut short, or larger than MAX_PIXELS: before its pixels take memory.
    """
    return decode_with_mode(data)[0]


def decode_with_mode(data: bytes) -> tuple[Image.Image, str]:
    """`decode`, and Pillow's mode of the image before conversion, like `L` or `CMYK`."""
    if not data:
        raise BadImage("the file is empty")
    try:
        image = _open(data)
        if image.format == "PNG":
            # Pillow checks a PNG's checksums in verify() only, and the image can't be used after it.
            image.verify()
            image = _open(data)
        image.load()
        mode = image.mode
        return _to_rgb(_upright(image)), mode
    except BadImage:
        raise
    except UnidentifiedImageError:
        # Pillow's own sentence holds an address in memory, which would make every ledger another.
        raise BadImage(f"no picture of a known format, or its header is damaged; it starts with {data[:8]!r}") from None
    except Exception as error:  # OSError, ValueError, SyntaxError, IndexError, struct.error, DecompressionBombError...
        raise BadImage(f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]) from None


def _open(data: bytes) -> Image.Image:
    """The image with its header read and its pixels not yet."""
    image = Image.open(io.BytesIO(data), formats=_formats())
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(
            f"{image.width} x {image.height} pixels are too many, the limit is {MAX_PIXELS // 10**6} million"
        )
    return image


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _upright(image: Image.Image) -> Image.Image:
    with suppress(
        Exception
    ):  # damaged EXIF data says nothing about the pixels: Pillow raises SyntaxError, struct.error...
        ImageOps.exif_transpose(image, in_place=True)  # without a copy where there is nothing to turn
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling by 1/257.
        grey = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
        grey *= 255
        grey += 32767
        grey //= 65535
    elif image.mode == "F":
        grey = np.nan_to_num(np.asarray(image, dtype=np.float32))
        if grey.max(initial=0.0) <= 1.0:
            grey *= 255
        np.clip(np.rint(grey, out=grey), 0, 255, out=grey)
    else:
        return image if image.mode == "RGB" else image.convert("RGB")
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
