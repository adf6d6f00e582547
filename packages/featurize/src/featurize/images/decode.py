"""From the bytes of a picture file to the pixels that encoders and codecs see."""

from __future__ import annotations

import io
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

Box = tuple[float, float, float, float]  # left, upper, right, lower, in pixels of the decoded picture

# Pillow has further formats; some of them run other programs (EPS) or are none that data sets use.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# Where Pillow begins to warn of bombs. A picture of this size needs about a gigabyte: 4 bytes a pixel, thrice at most.
MAX_PIXELS = 89_478_485

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}

# Odd metadata is no news to a run over a million pictures. Once and for all, because catch_warnings is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadPicture(Exception):
    """A picture that can't be decoded, with the reason for the ledger."""


def decode(data: bytes) -> Image.Image:
    """The whole picture as RGB, turned upright by its EXIF orientation; the first frame of an animation.

    Grey, palette, CMYK, YCCK, 16-bit and float pictures are converted; an alpha channel is dropped, as torchvision's
    loader does. Of 16-bit colour Pillow keeps the high byte, which is at most 1/255 below the rounded value. Raises
    BadPicture for anything that is damaged, cut short, or larger than MAX_PIXELS: before its pixels take memory.
    """
    return decode_with_mode(data)[0]


def decode_with_mode(data: bytes) -> tuple[Image.Image, str]:
    """`decode`, and Pillow's mode of the picture before conversion, like `L` or `CMYK`."""
    if not data:
        raise BadPicture("the file is empty")
    try:
        image = _open(data)
        if image.format == "PNG":
            # Pillow checks a PNG's checksums in verify() only, and the image can't be used after it.
            image.verify()
            image = _open(data)
        image.load()
        mode = image.mode
        return _to_rgb(_upright(image)), mode
    except BadPicture:
        raise
    except UnidentifiedImageError:
        # Pillow's own sentence holds an address in memory, which would make every ledger another.
        raise BadPicture(
            f"no picture of a known format, or its header is damaged; it starts with {data[:8]!r}"
        ) from None
    except Exception as error:  # OSError, ValueError, SyntaxError, IndexError, struct.error, DecompressionBombError...
        raise BadPicture(f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]) from None


def _open(data: bytes) -> Image.Image:
    """The picture with its header read and its pixels not yet."""
    image = Image.open(io.BytesIO(data), formats=_formats())
    if image.width * image.height > MAX_PIXELS:
        raise BadPicture(
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


@dataclass(frozen=True)
class CropRule:
    """Which box of a picture every encoder and codec sees, so that their grids see the same pixels.

    Without numbers the largest centred square. With them what an encoder's published evaluation sees: torchvision's
    Resize of the short side to `resize` pixels, then CenterCrop to `centre`.
    """

    resize: int | None = None
    centre: int | None = None

    def __str__(self) -> str:
        return "square" if self.resize is None else f"resize {self.resize} centre {self.centre}"

    def box(self, width: int, height: int) -> Box:
        """The box in a picture of this size."""
        if self.resize is None or self.centre is None:
            return square_box(width, height)
        return centre_box(width, height, self.resize, self.centre)


SQUARE = CropRule()


def square_box(width: int, height: int) -> Box:
    """The largest centred square."""
    side = min(width, height)
    left, upper = (width - side) // 2, (height - side) // 2
    return left, upper, left + side, upper + side


def centre_box(width: int, height: int, resize: int, centre: int) -> Box:
    """What torchvision's Resize(resize) and CenterCrop(centre) see, in pixels of the original.

    Both round: the long side down to whole pixels, the crop's corner to the nearest. So the box is a square only nearly, and
    its corners lie between pixels.
    """
    short = min(width, height)
    across, down = int(resize * width / short), int(resize * height / short)
    left, upper = round((across - centre) / 2), round((down - centre) / 2)
    x, y = width / across, height / down
    return left * x, upper * y, min((left + centre) * x, width), min((upper + centre) * y, height)


def crop(image: Image.Image, box: Box, size: int, interpolation: str) -> np.ndarray:
    """The box of a picture, resized with antialiasing to (size, size, 3) uint8.

    The filter reaches over the edge of the box into the picture, so this is what resizing the whole picture and cropping
    afterwards gives, without making the whole. Always across first, then down: so did Pillow when the encoders were
    published; today's takes the cheaper order, and bicubic overshoot clipped in between makes it other pixels.
    """
    left, upper, right, lower = box
    if (right - left, lower - upper) == (size, size) and all(float(edge).is_integer() for edge in box):
        return np.asarray(image.crop((int(left), int(upper), int(right), int(lower))))
    filter_ = INTERPOLATIONS[interpolation]
    # Rows that the second pass can't reach need no first pass; the widest filter reaches three scaled pixels.
    reach = 4 * max(1.0, (lower - upper) / size)
    top, bottom = max(0, int(upper - reach)), min(image.height, int(lower + reach) + 1)
    rows = image.crop((0, top, image.width, bottom)) if (top, bottom) != (0, image.height) else image
    across = rows.resize((size, rows.height), filter_, box=(left, 0, right, rows.height))
    return np.asarray(across.resize((size, size), filter_, box=(0, upper - top, size, lower - top)))
