"""The registry of sources: one line each. Lists a source's images, and reads one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module

from featurize.errors import UserError
from featurize.images.reasons import BadImage
from featurize.sources.listing import Lister, Listing, Query, SourceImage, split_in

WITHOUT_SPLITS = ("folder", "wds")
MAX_IMAGE = 1 << 30  # bytes: the most pixels that are decoded, uncompressed with 16 bits and four channels, are fewer


def list_images(source: str, split: str, limit: int | None, classes: str | None = None) -> Listing:
    """The images of SOURCE (`scenes[:SIZE]`, `wds:SHARDS`, `folder:DIR`, `imagenet:PLACE`, `coco:DIR`).

    Raises UserError for an unknown kind, an address where nothing is, and a source without images.
    """
    kind, _, address = source.partition(":")
    listers = _listers()
    if kind not in listers:
        known = ", ".join(f"{name}:" if name != "scenes" else name for name in listers)
        raise UserError(f"SOURCE '{source}' is of an unknown kind; start it with one of {known}.")
    if kind != "scenes" and not address:
        raise UserError(f"SOURCE '{source}' gives no address; write {kind}:ADDRESS.")
    if classes is not None and kind not in ("folder", "imagenet"):
        raise UserError(
            f"SOURCE '{source}' has no class folders to choose by --classes; it goes with imagenet: and folder:."
        )
    if split == "val" and kind in WITHOUT_SPLITS:
        raise UserError(
            f"SOURCE '{source}' has no splits, so --split val would take the very same images; leave it out, and name the "
            "held-out images by their own SOURCE."
        )
    listing = listers[kind]()(Query(address, split, limit, classes))
    if not listing.images:
        raise UserError(f"SOURCE '{source}' holds no images; check the path and the kind of source.")
    return replace(listing, remarks=(*listing.remarks, *_gaps(listing.images)))


def is_held_out(source: str, split: str) -> bool:
    """Whether a source's images are held out: by their split, or where it has none, by its name, like `folder:/data/val/images`.

    Raises UserError for an ImageNet folder that is not there.
    """
    kind, _, address = source.partition(":")
    if split == "val":
        return True
    if kind == "imagenet":
        from featurize.sources.imagenet import place_of

        return split_in(place_of(Query(address, split))) == "val"
    return kind in WITHOUT_SPLITS and split_in(address) == "val"


def read(image: SourceImage) -> bytes:
    """The bytes of the image file. Raises FileNotFoundError, BadImage for a file of gigabytes, OSError for a disk that fails, and
    UserError for a server that does not answer."""
    if image.size > MAX_IMAGE:
        raise BadImage(f"the file has {image.size / 1e9:,.1f} GB, more than the {MAX_IMAGE / 1e9:,.1f} that are read")
    if image.source.startswith("scenes:"):
        from featurize.sources.scenes import read_scene

        return read_scene(image)
    from featurize.io.addresses import read_range

    return read_range(image.source, image.offset, image.size)


def read_in_order(images: Sequence[SourceImage]) -> Iterator[Callable[[], bytes]]:
    """For each image what gives its bytes, as `read` does; files are read ahead, those that lie side by side together.

    Each must be called once, in any thread.
    """
    from featurize.io.ranges import Range, read_ahead

    in_files = [image.size <= MAX_IMAGE and not image.source.startswith("scenes:") for image in images]
    ahead = read_ahead(
        [Range(image.source, image.offset, image.size) for image, is_file in zip(images, in_files) if is_file]
    )
    for image, is_file in zip(images, in_files):
        yield next(ahead) if is_file else partial(read, image)
    next(ahead, None)  # to its end: what is still being read is given up where it is left before


def _gaps(images: Sequence[SourceImage]) -> list[str]:
    """Remarks where some images have a label or caption and some have none: that is seldom meant."""
    gaps = {
        "label": [image.key for image in images if image.label is None],
        "caption": [image.key for image in images if not image.captions],
    }
    return [
        f"{len(bare):,} of {len(images):,} images have no {what} (first: {bare[0]})."
        for what, bare in gaps.items()
        if 0 < len(bare) < len(images)
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
