"""The registry of sources: one line each. Lists a source's images, and reads one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module

from featurize.errors import UserError
from featurize.sources.listing import Lister, Listing, Query, SourceImage


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
    """What imports the lister of each kind: a source costs its imports only when it is used."""

    def lister(module: str, name: str) -> Callable[[], Lister]:
        return lambda: getattr(import_module(f"featurize.sources.{module}"), name)

    return {
        "scenes": lister("scenes", "list_scenes"),
        "wds": lister("shards", "list_shards"),
        "folder": lister("folders", "list_folder"),
        "imagenet": lister("imagenet", "list_imagenet"),
        "coco": lister("coco", "list_coco"),
        "coco2014": lister("coco", "list_coco_2014"),
        "coco2017": lister("coco", "list_coco_2017"),
    }
