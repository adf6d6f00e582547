"""The embedded source `scenes`: images drawn when they are read."""

from __future__ import annotations

from featurize.errors import UserError
from featurize.sources.listing import Listing, Query, SourceImage

DEFAULT_COUNT = {"train": 6000, "val": 2000}
DEFAULT_SIZE  = 32  # fmt: skip
SEED          = 0  # fmt: skip


def list_scenes(query: Query) -> Listing:
    """`scenes` or `scenes:SIZE`: `limit` scenes (without one 6000 to train on, 2000 to test) of SIZE pixels (32)."""
    from featurize.scenes import tell_scene

    size = query.address
    if size and not (size.isdecimal() and 8 <= int(size) <= 1024):
        raise UserError(f"SOURCE 'scenes:{size}' needs a size in pixels from 8 to 1024, like scenes:64.")
    address = f"scenes:{query.split}:{int(size or DEFAULT_SIZE)}"

    def image(index: int) -> SourceImage:
        story = tell_scene(SEED, query.split, index)
        return SourceImage(f"{query.split}-{index:08d}", address, index, 0, story.label, story.captions)

    return Listing(tuple(image(index) for index in range(query.limit or DEFAULT_COUNT[query.split])))


def read_scene(image: SourceImage) -> bytes:
    """The scene as a PNG file's bytes."""
    from featurize.scenes import draw_scene

    _, split, size = image.source.split(":")
    return draw_scene(SEED, split, image.offset, int(size)).png()
