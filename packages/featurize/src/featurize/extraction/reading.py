"""An image's bytes, where a file that is gone, or a disk that fails, is told apart from an image that is damaged."""

from __future__ import annotations

from featurize.errors import UserError
from featurize.sources import SourceImage, read


def read_listed(image: SourceImage, was_there: bool) -> bytes:
    """The bytes of an image file. With `was_there` it has been seen before, so that its absence says nothing about the image.

    Raises UserError where the file is gone or shorter than it was listed, or the disk or network share fails: the run is to
    stop, not to refuse every image that follows. Raises FileNotFoundError for a file that nobody has seen, PermissionError, and
    what `sources.read` raises for a remote one.
    """
    try:
        data = read(image)
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
