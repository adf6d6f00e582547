"""Where images come from: each source lists its images, and `read` gives the bytes of one. One file a kind of source.

`listing` says what is listed, `registry` knows the kinds. May import errors, io, scenes, and of images the
reason for a refusal. The names below are the folder's interface.
"""

from featurize.sources.listing import EXTENSIONS, Index, Listing, Query, SourceImage, numbered_as
from featurize.sources.registry import is_held_out, list_images, read, read_in_order

__all__ = [
    "EXTENSIONS",
    "Index",
    "Listing",
    "Query",
    "SourceImage",
    "is_held_out",
    "list_images",
    "numbered_as",
    "read",
    "read_in_order",
]
