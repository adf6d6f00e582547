"""Where pictures come from: each source lists its pictures, and `read` brings the bytes of one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from operator import attrgetter

from featurize.errors import UserError

# What can be decoded, and heic, which can't: such a picture is refused in the ledger, not passed over. Of a sample with
# several (a photo and its mask), the first in this order is the picture.
EXTENSIONS = (
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "ppm", "pgm", "pbm", "pnm", "bmp", "gif", "tif", "tiff", "jp2",
    "avif", "avifs", "ico", "heic", "heif",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One picture of a source, not yet read.

    `source` is a file or a remote address, of which the bytes [offset, offset + size) are the picture; for drawn pictures
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
    """All pictures of a source, in its order, with what was odd about it in sentences."""

    images: tuple[SourceImage, ...]
    remarks: tuple[str, ...] = ()

    @cached_property
    def sha256(self) -> str:
        """Digest of what was listed and of the files' versions: the same files need no second look."""
        digest = hashlib.sha256()
        line = attrgetter("key", "source", "offset", "size", "label", "captions", "version")
        for start in range(0, len(self.images), 4096):
            digest.update(json.dumps([line(picture) for picture in self.images[start : start + 4096]]).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Index:
    """The pictures of a shard, in its order, and what was odd: (what, how often, where first)."""

    images: tuple[SourceImage, ...]
    odd: tuple[tuple[str, int, str], ...]


@dataclass(frozen=True)
class Query:
    """What of a source is asked for. `classes` is a file of class names, or the name of a list that ships with the package."""

    address: str
    split: str
    limit: int | None = None
    classes: str | None = None


Lister = Callable[[Query], Listing]


def list_images(source: str, split: str, limit: int | None, classes: str | None = None) -> Listing:
    """The pictures of SOURCE (`scenes[:SIZE]`, `wds:SHARDS`, `folder:DIR`, `imagenet:PLACE`, `coco:DIR`).

    Raises UserError for an unknown kind, a place that is not there, and a source without pictures.
    """
    kind, _, address = source.partition(":")
    listers = _listers()
    if kind not in listers:
        known = ", ".join(f"{name}:" if name != "scenes" else name for name in listers)
        raise UserError(f"SOURCE '{source}' is of no known kind; it starts with one of {known}.")
    if kind != "scenes" and not address:
        raise UserError(f"SOURCE '{source}' names no place; write {kind}:PLACE.")
    if classes is not None and kind not in ("folder", "imagenet"):
        raise UserError(
            f"SOURCE '{source}' has no class folders to choose by --classes; it goes with imagenet: and folder:."
        )
    listing = listers[kind]()(Query(address, split, limit, classes))
    if not listing.images:
        raise UserError(f"SOURCE '{source}' holds no pictures; check the path and the kind of source.")
    return replace(listing, remarks=(*listing.remarks, *_gaps(listing.images)))


def read(picture: SourceImage) -> bytes:
    """The bytes of the picture file. Raises FileNotFoundError, and UserError for a remote place that does not answer."""
    if picture.source.startswith("scenes:"):
        from featurize.sources import scenes as scenes_

        return scenes_.read(picture)
    from featurize.io.addresses import read_range

    return read_range(picture.source, picture.offset, picture.size)


def _gaps(pictures: Sequence[SourceImage]) -> list[str]:
    """Some pictures with, some without: seldom what was meant."""
    gaps = {
        "label": [picture.key for picture in pictures if picture.label is None],
        "caption": [picture.key for picture in pictures if not picture.captions],
    }
    return [
        f"{len(bare):,} of {len(pictures):,} pictures have no {what} (first: {bare[0]})."
        for what, bare in gaps.items()
        if 0 < len(bare) < len(pictures)
    ]


def _listers() -> dict[str, Callable[[], Lister]]:
    """For each kind what brings its lister: a source costs its imports only when it is used."""

    def of(module: str, name: str) -> Callable[[], Lister]:
        return lambda: getattr(import_module(f"featurize.sources.{module}"), name)

    return {
        "scenes": of("scenes", "list_scenes"),
        "wds": of("shards", "list_shards"),
        "folder": of("folders", "list_folder"),
        "imagenet": of("imagenet", "list_imagenet"),
        "coco": of("coco", "list_coco"),
        "coco2014": of("coco", "list_coco_2014"),
        "coco2017": of("coco", "list_coco_2017"),
    }
