"""ImageNet as people have it: the folder tree, the flat validation folder, the official tar files, webdataset shards."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from featurize.errors import UserError
from featurize.io.addresses import existing_folder, is_folder, is_remote, local_path, subfolders
from featurize.sources.class_lists import WNID, read_classes
from featurize.sources.folders import holds_images, list_tree
from featurize.sources.listing import Listing, Query, SourceImage, split_in
from featurize.sources.outside_text import printable
from featurize.sources.shards import list_shards
from featurize.sources.val_labels import find_val_labels

VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")
COUNTS = {"train": 1_281_167, "val": 50_000}
# Where the split lies below the folder that is named: as torchvision wants it, and as Kaggle's archive unpacks.
BELOW = ("{split}", "ILSVRC/Data/CLS-LOC/{split}", "Data/CLS-LOC/{split}")


def list_imagenet(query: Query) -> Listing:
    """ImageNet's images with their labels: the class's position among the sorted wnids.

    Those are the wnids of `classes` where it is given, else the folders that are here, and for shards all 1000. The
    address is a folder that holds `train/` and `val/`, or the `<wnid>/` folders, or the flat validation pictures beside a
    file of their labels (`val_labels.py`); or tar files, webdataset shards as well as the official ones.
    """
    root = place_of(query)
    if query.split == "val" and split_in(root) == "train":
        raise UserError(
            f"{root} is the training split by its name, so --split val would take training images; name the validation images."
        )
    if _is_tar(query.address):
        return _list_tars(query)
    folders = subfolders(root)
    wnids = [name for name in folders if WNID.fullmatch(name)]
    # What unpacking left, like __MACOSX, is no class.
    strange = next((name for name in folders if not WNID.fullmatch(name) and holds_images(root, name)), None)
    if strange is not None:
        raise UserError(
            f"{root} is not an ImageNet tree: its folders are named like n01440764, found '{printable(strange)}'; use "
            f"folder:{root}."
        )
    if not wnids:
        return _list_flat(root, query)
    classes = _classes(query)
    if classes is not None:
        return list_tree(root, classes, query.limit)
    # All classes are numbered as in the whole, even where one lost its pictures.
    every = set(wnids) == set(read_classes("imagenet"))
    listing = list_tree(root, read_classes("imagenet") if every else None, query.limit)
    return replace(listing, remarks=(*listing.remarks, *_checked(wnids, listing, query)))


def place_of(query: Query) -> str:
    """Where the split's images are: the address of tar files, the split's folder below the address, or the address's own
    folder where there is none. Raises UserError where that is not there."""
    if _is_tar(query.address):
        return query.address
    root = existing_folder(query.address)
    return next((f"{root}/{b}" for b in (b.format(split=query.split) for b in BELOW) if is_folder(f"{root}/{b}")), root)


def _is_tar(address: str) -> bool:
    return ".tar" in address.rstrip("/").rpartition("/")[2] and not is_folder(address)


def _classes(query: Query) -> tuple[str, ...] | None:
    if query.classes is None:
        return None
    classes = read_classes(query.classes)
    strange = next((name for name in classes if not WNID.fullmatch(name)), None)
    if strange:
        raise UserError(f"The list of classes {query.classes} names '{strange}', which is not a wnid like n01440764.")
    return classes


def _checked(wnids: Sequence[str], listing: Listing, query: Query) -> list[str]:
    all_wnids = read_classes("imagenet")
    foreign = set(wnids).difference(all_wnids)
    if foreign:
        return [f"Folders that are not classes of ImageNet-1k: {len(foreign)} of {len(wnids)} (first: {min(foreign)})."]
    if len(wnids) < len(all_wnids):
        return [
            f"{len(wnids)} of ImageNet's 1000 classes are here, numbered among themselves; --classes imagenet numbers them "
            "as in the whole."
        ]
    return _counted(len(listing.images), query)


def _counted(found: int, query: Query) -> list[str]:
    split = split_in(place_of(query)) or query.split
    if query.limit is not None or found == COUNTS[split]:
        return []
    return [f"{found:,} pictures are here; the {split} split of ImageNet-1k has {COUNTS[split]:,}."]


def _list_flat(root: str, query: Query) -> Listing:
    """The official validation folder, `ILSVRC2012_val_00000001.JPEG` and so on, labelled from a file beside it."""
    listing = list_tree(root, None, None)
    if not listing.images or not all(VAL_NAME.match(image.key) for image in listing.images):
        raise UserError(
            f"{root} is not an ImageNet tree: it has neither folders named like n01440764 nor pictures named like "
            f"ILSVRC2012_val_00000001.JPEG; use folder:{root}."
        )
    wnids, remark = _val_wnids(root, listing.images)
    return _chosen(query, listing, wnids, (remark,))


def _list_tars(query: Query) -> Listing:
    """Shards with integer `.cls`, or with wnids in the keys (`n01440764_10026`); the official tar files as they are."""
    listing = list_shards(replace(query, limit=None if query.classes else query.limit))
    if not listing.images:
        return listing
    if all(VAL_NAME.match(image.key) and image.label is None for image in listing.images):
        folder = local_path(listing.images[0].source).rpartition("/")[0]
        wnids, remark = _val_wnids(folder, listing.images)
        return _chosen(query, listing, wnids, (remark,))
    wnids = [_wnid_of(image) for image in listing.images]
    if not any(wnids):
        raise UserError(
            f"The shards {query.address} have no labels: neither .cls nor wnids in the keys; use wds:{query.address}."
        )
    return _chosen(query, listing, wnids, ())


def _wnid_of(image: SourceImage) -> str | None:
    """By the picture's label or by the wnid in its key, which must not contradict each other."""
    wnids = read_classes("imagenet")
    found = WNID.search(image.key)
    if image.label is None:
        return found.group() if found else None
    if not 0 <= image.label < len(wnids):
        raise UserError(f"The label {image.label} of {image.key} in {image.source} is not from 0 to 999; use wds:.")
    wnid = wnids[image.label]
    if found and found.group() in wnids and found.group() != wnid:
        raise UserError(
            f"{image.key} in {image.source} has the label {image.label}, which in ImageNet's sorted order is {wnid}: "
            "these shards number the classes in another way; use wds: to keep it."
        )
    return wnid


def _val_wnids(folder: str, images: Sequence[SourceImage]) -> tuple[list[str | None], str]:
    """The wnid of each official validation image, and a remark that names the file of them."""
    if is_remote(folder):
        raise UserError(
            f"The labels of the images in {folder} can't be found, as their files are read on this machine only; copy the images "
            "here, with a file of their labels beside them, or name shards that have .cls."
        )
    truth = find_val_labels(Path(folder))
    if truth is None:
        raise UserError(
            f"The labels of the images in {folder} are not beside them; copy there LOC_val_solution.csv, "
            "imagenet_2012_validation_synset_labels.txt, val.txt or the ILSVRC2012_devkit_t12 folder."
        )
    numbers = [int(match.group(1)) for match in (VAL_NAME.match(image.key) for image in images) if match]
    lost = next((number for number in numbers if number not in truth.wnids), None)
    if lost is not None:
        raise UserError(f"{truth.path} has no label for ILSVRC2012_val_{lost:08d}; copy the whole file.")
    return [truth.wnids[number] for number in numbers], f"The labels are those of {truth.path}."


def _chosen(query: Query, listing: Listing, wnids: Sequence[str | None], remarks: tuple[str, ...]) -> Listing:
    """The listing labelled by its wnids; with `classes`, the pictures of these classes only."""
    classes = _classes(query)
    labels = {wnid: label for label, wnid in enumerate(classes or read_classes("imagenet"))}
    images = [
        replace(image, label=labels.get(wnid or ""))
        for image, wnid in zip(listing.images, wnids, strict=True)
        if classes is None or wnid in labels
    ]
    if classes is None:
        remarks = (*remarks, *_counted(len(images), query))
    else:
        empty = len(set(labels.values()) - {image.label for image in images})
        remarks = (*remarks, *([f"Classes without a picture: {empty} of {len(classes)}."] if empty else []))
    return Listing(tuple(images[: query.limit]), (*listing.remarks, *remarks), tuple(labels))
