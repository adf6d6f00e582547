"""The bytes of images, where a file that is gone, or a disk that fails, is told apart from an image that is damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from featurize.errors import UserError
from featurize.sources import SourceImage, read_in_order

Reader = Callable[[], bytes]


def readers(images: Sequence[SourceImage], were_there: bool) -> Iterator[Reader]:
    """For each image what gives its bytes, read ahead. Each must be called once, in any thread.

    With `were_there`, or where the listing had a version of its file, an image has been seen before, so that its absence says
    nothing about it. What gives the bytes raises UserError where such a file is gone or shorter than it was listed, or where the
    disk, network share or server fails: the run is to stop, not to refuse every image that follows. It raises FileNotFoundError
    for a file that nobody has seen, PermissionError, and BadImage for one of gigabytes.
    """
    for image, reader in zip(images, read_in_order(images), strict=True):
        yield partial(_read_listed, image, reader, were_there or bool(image.version))


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
