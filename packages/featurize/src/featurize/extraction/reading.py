"""The bytes of images, where a file that is gone, or a disk that fails, is told apart from an image that is damaged."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from PIL import Image

from featurize.errors import UserError
from featurize.images.decode import Profile, examine
from featurize.images.reasons import BadImage
from featurize.sources import SourceImage, read_in_order

Reader = Callable[[], bytes]


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
    """An image decoded for the first time (None where that is impossible), and the seconds that reading and decoding took."""

    examined: Examined
    image: Image.Image | None
    reading: float
    decoding: float


def first_look(reader: Reader, profile: Profile = "ignore", least: int = 0) -> FirstLook:
    """Read and decode a listed image, as `images.decode` does. Raises UserError as `readers` says."""
    start = read_at = time.perf_counter()
    decoded = None
    try:
        data = reader()
        read_at = time.perf_counter()
        found = examine(data, profile, least)
        decoded = found.image
        examined = Examined("", hashlib.sha256(data).hexdigest(), *found.size, found.mode, found.warning)
    except BadImage as error:
        examined = Examined(str(error))
    except FileNotFoundError:
        examined = Examined("the file is not there")
    except PermissionError:
        examined = Examined("the file may not be read: permission is denied")
    return FirstLook(examined, decoded, read_at - start, time.perf_counter() - read_at)


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
