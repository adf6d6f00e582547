"""The embedded source `scenes`: pictures drawn when they are asked for."""

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
    place = f"scenes:{query.split}:{int(size or DEFAULT_SIZE)}"

    def picture(index: int) -> SourceImage:
        story = tell_scene(SEED, query.split, index)
        return SourceImage(f"{query.split}-{index:08d}", place, index, 0, story.label, story.captions)

    return Listing(tuple(picture(index) for index in range(query.limit or DEFAULT_COUNT[query.split])))


def read(picture: SourceImage) -> bytes:
    """The scene as a PNG file's bytes."""
    from featurize.scenes import draw_scene

    _, split, size = picture.source.split(":")
    return draw_scene(SEED, split, picture.offset, int(size)).png()
