"""The bytes of images, where a file that is gone, or a disk that fails, is told apart from an image that is damaged."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from featurize.errors import UserError
from featurize.images.crop import CropRule, InputSpec, crop
from featurize.images.decode import Profile, decode, examine, size_for_nvjpeg
from featurize.images.reasons import BadImage
from featurize.sources import SourceImage, read_in_order

Reader = Callable[[], bytes]

DENIED = "the file may not be read: permission is denied"
# Long side to short side. Some crops resize the whole image until its short side is the network's: at 512 pixels this is a
# gigabyte, of an image whose crop shows a thousandth of it.
MAX_ASPECT = 1000


@dataclass(frozen=True, slots=True)
class Examined:
    """What the ledger says of an image once it is decoded: the reason why it is refused, or its digest, size and mode, and what
    libjpeg warns of in its file."""

    reason: str = ""
    sha256: str = ""
    width: int | None = None
    height: int | None = None
    mode: str | None = None
    warning: str = ""

    def refusal(self, strict: bool) -> str:
        """Why the image is refused, "" where it is not; `strict` refuses those that libjpeg warns of."""
        return self.reason or (self.warning if strict else "")


@dataclass(frozen=True)
class FirstLook:
    """An image decoded for the first time, or its file where that is left to nvJPEG (None where neither is possible), and the
    seconds that reading and decoding took."""

    examined: Examined
    image: Image.Image | bytes | None
    reading: float
    decoding: float


def first_look(reader: Reader, profile: Profile = "ignore", least: int = 0, decoder: str = "pillow") -> FirstLook:
    """Read and decode a listed image, as `images.decode` does; with the decoder "nvjpeg" one that it can decode is not.
    Raises UserError as `readers` says.

    An image that is a line is refused here, and not where one that a store has already is decoded again."""
    start = read_at = time.perf_counter()
    decoded: Image.Image | bytes | None = None
    try:
        data = reader()
        read_at = time.perf_counter()
        if decoder == "nvjpeg" and (size := size_for_nvjpeg(data, profile)):
            decoded = data
            examined = Examined("", hashlib.sha256(data).hexdigest(), *size, "RGB")
        else:
            found = examine(data, profile, least)
            size, decoded = found.size, found.image
            examined = Examined("", hashlib.sha256(data).hexdigest(), *size, found.mode, found.warning)
        if max(size) > MAX_ASPECT * min(size):
            raise BadImage(f"{size[0]} x {size[1]} pixels are a line: one side is over {MAX_ASPECT} times the other")
    except BadImage as error:
        examined, decoded = Examined(str(error)), None
    except FileNotFoundError:
        examined = Examined("the file is not there")
    except PermissionError:
        examined = Examined(DENIED)
    return FirstLook(examined, decoded, read_at - start, time.perf_counter() - read_at)


def load_crops_of(
    image: SourceImage,
    reader: Reader,
    digest: str,
    rule: CropRule,
    inputs: tuple[InputSpec, ...],
    profile: Profile,
    least: int = 0,
    decoder: str = "pillow",
) -> tuple[tuple[np.ndarray, ...] | bytes, float, float]:
    """(uint8 (S, S, 3) for each input, or the file where that is left to nvJPEG; seconds of waiting for the bytes; seconds of
    decoding and resizing).

    Raises UserError for an image whose bytes have another SHA-256 than `digest`, and for a file that is gone or may not be read.
    """
    start = time.perf_counter()
    try:
        data = reader()
        read_at = time.perf_counter()
        if hashlib.sha256(data).hexdigest() != digest:
            raise BadImage("its bytes are others")
        left = decoder == "nvjpeg" and size_for_nvjpeg(data, profile) is not None
        image_ = None if left else decode(data, profile, least)
    except UserError:  # a disk is gone, or a remote place does not answer: that says nothing about the image
        raise
    except PermissionError:
        raise UserError(
            f"The picture {image.key} ({image.source}) may not be read any more; fix its permissions and run the same command "
            "again, it goes on."
        ) from None
    except Exception as error:
        raise UserError(
            f"The picture {image.key} ({image.source}) has changed since the ledger was made: {error}; "
            "restore the file, or remove the store root and extract again."
        ) from None
    crops = data if image_ is None else tuple(crop(image_, rule, spec) for spec in inputs)
    return crops, read_at - start, time.perf_counter() - read_at


def readers(images: Sequence[SourceImage], were_there: Sequence[bool]) -> Iterator[Reader]:
    """For each image what gives its bytes, read ahead. Each must be called once, in any thread.

    Where it was there before, or the listing had a version of its file, an image has been seen before, so that its absence says
    nothing about it. What gives the bytes raises UserError where such a file is gone or shorter than it was listed, or where the
    disk, network share or server fails: the run is to stop, not to refuse every image that follows. It raises FileNotFoundError
    for a file that nobody has seen, PermissionError, and BadImage for one of gigabytes.
    """
    for image, was_there, reader in zip(images, were_there, read_in_order(images), strict=True):
        yield partial(_read_listed, image, reader, was_there or bool(image.version))


def _read_listed(image: SourceImage, reader: Reader, was_there: bool) -> bytes:
    try:
        data = reader()
    except PermissionError:
        raise
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not was_there:
            raise
        raise UserError(
            f"The picture {image.key} ({image.source}) can't be read any more ({error.strerror or error}): is a disk or network "
            "share gone? Bring it back and run the same command again, it goes on."
        ) from None
    if image.version and len(data) < image.size:
        raise UserError(
            f"The picture {image.key} ({image.source}) has {len(data):,} bytes and had {image.size:,} when it was listed: is it "
            "still being copied? Run the same command again when the files no longer change."
        )
    return data
