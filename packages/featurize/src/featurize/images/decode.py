"""From the bytes of an image file to an upright RGB image."""

from __future__ import annotations

import io
import re
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Literal

from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from featurize.images.grey import grey_to_8_bits
from featurize.images.jpeg import is_for_nvjpeg, load_jpeg, why_unreadable
from featurize.images.profile import to_srgb
from featurize.images.reasons import BadImage
from featurize.images.tiff import silence_libtiff

# Pillow has further formats; some of them run other programs (EPS) or are not used by data sets.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# First bytes of formats that data sets do hold but that aren't read here, after an offset.
OTHER_FORMATS = (
    ("a HEIF picture", 4, (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1", b"ftyphevc")),
    ("a JPEG XL picture", 0, (b"\xff\x0a", b"\0\0\0\x0cJXL ")),
    ("a JPEG XR picture", 0, (b"II\xbc",)),
    ("a Photoshop file", 0, (b"8BPS",)),
    ("an OpenEXR picture", 0, (b"v/1\x01",)),
    ("a TIFF of uncommon or damaged pixels", 0, (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
)
# Where Pillow begins to warn of bombs. An image of this size needs about a gigabyte: 4 bytes a pixel, thrice at most.
MAX_PIXELS = 89_478_485
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

SIDEWAYS = tuple(TRANSPOSE[orientation] for orientation in (5, 6, 7, 8))

Profile = Literal["ignore", "srgb"]  # what to do with an embedded colour profile

# Odd metadata does not matter to a run over a million images. Set once, because catch_warnings is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")
# A sound PNG may hold megabytes of text or of a colour profile: Pillow's bound on all of it together is enough.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


@dataclass(frozen=True)
class Decoded:
    """An upright RGB image, Pillow's mode of it before conversion, like `L` or `CMYK`, its (width, height), which are more than
    the image's where that was decoded smaller, and what libjpeg warns of in its file: "" where it warns of nothing, and for
    other formats, where damage is an error."""

    image: Image.Image
    mode: str
    size: tuple[int, int]
    warning: str = ""


def decode(data: bytes, profile: Profile = "ignore", least: int = 0) -> Image.Image:
    """The whole image as RGB, turned upright by its EXIF orientation (or XMP's, where EXIF gives none); the first frame of
    an animation.

    Grey, palette, CMYK, YCCK, 12- and 16-bit and float images are converted; an alpha channel is dropped, as torchvision's
    loader does. From 16-bit colour Pillow takes the high byte, which is at most 1/255 below the rounded value. With `profile`
    "srgb" colours are converted from the embedded profile to sRGB; by default the profile is ignored, as the encoders'
    authors did. A JPEG whose short side has `least` pixels or more at four, three, two or one eighths of its size is decoded at
    that size; 0 stands for the whole. Raises BadImage for anything that is damaged, cut short, or takes more than bounded
    memory and time.
    """
    return examine(data, profile, least).image


def examine(data: bytes, profile: Profile = "ignore", least: int = 0) -> Decoded:
    """`decode`, with what the ledger says of an image besides."""
    if not data:
        raise BadImage("the file is empty")
    try:
        image = _open(data)
        if image.format == "PNG":
            # Pillow checks a PNG's checksums in verify() only, and the image can't be used after it.
            image.verify()
            image = _open(data)
        mode, warning, pixels = image.mode, "", image
        if image.format in ("JPEG", "MPO"):
            pixels, warning = load_jpeg(image, data, least)
        else:
            if image.format == "TIFF":
                silence_libtiff()
            image.load()
            mode = image.mode
        width, height = image.size
        size = (height, width) if _turn(image) in SIDEWAYS else (width, height)
        return Decoded(upright_rgb(pixels, image, profile), mode, size, warning)
    except BadImage:
        raise
    except UnidentifiedImageError:
        # Pillow's own sentence holds an address in memory, which would make every ledger another.
        raise BadImage(_why_unknown(data)) from None
    except Image.DecompressionBombError:  # twice MAX_PIXELS and more, found by Pillow itself
        raise BadImage(f"too many pixels, the limit is {MAX_PIXELS // 10**6} million") from None
    except Exception as error:  # OSError, ValueError, SyntaxError, IndexError, struct.error...
        words = " ".join(str(error).split())
        if re.match(
            r"decoder error|(broken|unrecognized) data stream", words
        ):  # Pillow's words for what a library refuses
            words = "the compressed data are damaged"
        raise BadImage(f"its pixels can't be decoded ({words})"[:200]) from None


def size_for_nvjpeg(data: bytes, profile: Profile = "ignore") -> tuple[int, int] | None:
    """(width, height) of a file that nvJPEG is to decode: a JPEG that a GPU's engines can, and whose pixels are then neither
    turned nor converted. None for any other: `examine` decodes it, or says why it can't."""
    if not is_for_nvjpeg(data):
        return None
    try:
        image = _open(data)
        converted = profile == "srgb" and image.info.get("icc_profile")
        plain = image.format == "JPEG" and image.mode == "RGB" and not converted and _turn(image) is None
    except Exception:  # as `examine` says
        return None
    return image.size if plain else None


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


def _why_unknown(data: bytes) -> str:
    """Why Pillow does not know a file: it may be sound and of a kind that is not read here."""
    unreadable = why_unreadable(data)
    for name, offset, starts in OTHER_FORMATS:
        if data[offset:].startswith(starts):
            unreadable = name
    if unreadable:
        return f"{unreadable}, which can't be read"
    return f"no picture of a known format, or its header is damaged; it starts with {data[:8]!r}"


def upright_rgb(pixels: Image.Image, image: Image.Image, profile: Profile) -> Image.Image:
    """Loaded pixels as RGB, turned upright, as `decode` says; `image` is the file they come from, with its orientation and
    colour profile. Raises BadImage for grey values of unknown scale."""
    if pixels.mode.startswith("I;16") or pixels.mode in ("I", "F"):
        pixels = grey_to_8_bits(pixels)
    embedded = image.info.get("icc_profile") if profile == "srgb" else None
    if embedded:
        pixels = to_srgb(pixels, embedded)
    elif pixels.mode != "RGB":
        pixels = pixels.convert("RGB")
    turn = _turn(image)
    return pixels if turn is None else pixels.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns the pixels upright, by the file's orientation."""
    orientation = None
    with suppress(
        Exception
    ):  # damaged EXIF data says nothing of the pixels: Pillow raises SyntaxError, struct.error...
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    return TRANSPOSE.get(orientation) if isinstance(orientation, int) else None
