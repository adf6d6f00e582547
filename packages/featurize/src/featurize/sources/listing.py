"""What a source lists: images that are not read yet, with their labels and captions."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter

# What can be decoded, and heic, which can't: such an image is refused in the ledger, not skipped. In a sample with several
# (a photo and its mask), the first in this order is the image.
EXTENSIONS = (
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "ppm", "pgm", "pbm", "pnm", "bmp", "gif", "tif", "tiff", "jp2",
    "avif", "avifs", "ico", "heic", "heif",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One image of a source, not yet read.

    `source` is a file or a remote address, of which the bytes [offset, offset + size) are the image; for drawn images
    it is the generator's address and `offset` the index. `version` tells a changed file from the same one: a time, an ETag.
    """

    key: str
    source: str
    offset: int
    size: int
    label: int | None = None
    captions: tuple[str, ...] = ()
    version: int | str = 0


@dataclass(frozen=True)
class Listing:
    """All images of a source, in its order, with remarks (whole sentences) on what was odd.

    `classes[label]` is the name of a label, where labels have names.
    """

    images: tuple[SourceImage, ...]
    remarks: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    @cached_property
    def sha256(self) -> str:
        """Digest of what was listed and of the files' versions: the same files need not be read again."""
        digest = hashlib.sha256()
        line = attrgetter("key", "source", "offset", "size", "label", "captions", "version")
        for start in range(0, len(self.images), 4096):
            digest.update(json.dumps([line(picture) for picture in self.images[start : start + 4096]]).encode())
        return digest.hexdigest()


def numbered_as(listing: Listing, classes: tuple[str, ...]) -> Listing:
    """The listing with the labels that the same names have in `classes`, another data set's; further names come after these.

    So a validation split that lacks a class is not renumbered. Where no name is the same, the labels stay.
    """
    own = listing.classes
    if not own or not classes or own == classes[: len(own)]:
        return listing
    new = [name for name in own if name not in set(classes)]
    if len(new) == len(own):
        remark = (
            f"None of the {len(own)} classes (first: {own[0]}) is in the store of --basis; they keep their own labels."
        )
        return replace(listing, remarks=(*listing.remarks, remark))
    together = (*classes, *new)
    numbers = {name: number for number, name in enumerate(together)}
    remark = f"The classes have the labels of the store of --basis: {own[-1]} is {numbers[own[-1]]}."
    if new:
        remark += f" Classes that it lacks are numbered after its own: {len(new)} (first: {new[0]})."
    images = tuple(
        image if image.label is None else replace(image, label=numbers[own[image.label]]) for image in listing.images
    )
    return Listing(images, (*listing.remarks, remark), together)


@dataclass(frozen=True)
class Index:
    """The images of a shard, in its order, and what was odd: (what, how often, where first)."""

    images: tuple[SourceImage, ...]
    odd: tuple[tuple[str, int, str], ...]


@dataclass(frozen=True)
class Query:
    """Which part of a source is requested. `classes` is a file of class names, or the name of a list in the package."""

    address: str
    split: str
    limit: int | None = None
    classes: str | None = None


HELD_OUT = r"val|valid|validation|test"
TRAINING = r"train|training"


def split_in(address: str) -> str | None:
    """The split that a path names in its last part, `img_val.tar`, or that one of two folders above is called, `val/images`.

    "train", "val" for any held-out one, or None.
    """
    last, *above = reversed(address.rstrip("/").split("/"))
    words = set(re.split(r"[^a-z]+", last.lower()))
    for split, names in (("train", TRAINING), ("val", HELD_OUT)):
        if words.intersection(names.split("|")):
            return split
    for folder in above[:2]:
        for split, names in (("train", TRAINING), ("val", HELD_OUT)):
            if re.fullmatch(rf"({names})\d*", folder.lower()):
                return split
    return None


Lister = Callable[[Query], Listing]
