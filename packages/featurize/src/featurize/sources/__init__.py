"""Where pictures come from: each source lists its pictures, and `read` brings the bytes of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from featurize.errors import UserError


@dataclass(frozen=True)
class Picture:
    """One picture of a source, not yet read.

    `source` is a file, of which the bytes [offset, offset + size) are the picture; for drawn pictures it is the
    generator's address and `offset` the index.
    """

    key: str
    source: str
    offset: int
    size: int
    label: int | None = None
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Listing:
    """All pictures of a source, in its order, with what was odd about it in sentences."""

    pictures: tuple[Picture, ...]
    remarks: tuple[str, ...] = ()


Lister = Callable[[str, str, int | None], Listing]  # (address, split, limit) -> Listing


def list_pictures(source: str, split: str, limit: int | None) -> Listing:
    """The pictures of SOURCE (`scenes[:SIZE]`, `wds:SHARDS`, `folder:DIR`, `imagenet:DIR`, `coco:DIR`).

    Raises UserError for an unknown kind, a place that is not there, and a source without pictures.
    """
    kind, _, address = source.partition(":")
    listers = _listers()
    if kind not in listers:
        known = ", ".join(f"{name}:" if name != "scenes" else name for name in listers)
        raise UserError(f"SOURCE '{source}' is of no known kind; it starts with one of {known}.")
    if kind != "scenes" and not address:
        raise UserError(f"SOURCE '{source}' names no place; write {kind}:PLACE.")
    listing = listers[kind](address, split, limit)
    if not listing.pictures:
        raise UserError(f"SOURCE '{source}' holds no pictures; check the path and the kind of source.")
    return listing


def read(picture: Picture) -> bytes:
    """The bytes of the picture file."""
    if picture.source.startswith("scenes:"):
        from featurize.sources import drawn

        return drawn.read(picture)
    with open(picture.source, "rb") as file:
        file.seek(picture.offset)
        return file.read(picture.size)


def existing_folder(address: str) -> Path:
    """The address as a folder that is there, or UserError."""
    folder = Path(address).expanduser()
    if not folder.is_dir():
        raise UserError(f"The folder {folder} is not there; check the path of SOURCE.")
    return folder.resolve()


def _listers() -> dict[str, Lister]:
    # Imported here, so that a source costs its imports only when it is used.
    from featurize.sources import coco, drawn, folders, shards

    return {
        "scenes": drawn.list_scenes,
        "wds": shards.list_shards,
        "folder": folders.list_folder,
        "imagenet": folders.list_imagenet,
        "coco": coco.list_coco,
    }
