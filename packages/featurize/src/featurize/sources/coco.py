"""COCO's layout: `<split><year>/` pictures and `annotations/captions_<split><year>.json`."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from featurize.errors import UserError
from featurize.sources import Listing, Picture, existing_folder

YEARS = (2014, 2017)


def list_coco(address: str, split: str, limit: int | None) -> Listing:
    """The pictures that the split's captions file names, in its order, with their captions.

    A picture that the file names and the disk lacks is listed all the same: the ledger says why it has no row.
    """
    root = existing_folder(address)
    year = next((year for year in YEARS if (root / "annotations" / f"captions_{split}{year}.json").is_file()), None)
    if year is None:
        wanted = " or ".join(f"captions_{split}{year}.json" for year in YEARS)
        raise UserError(f"{root} has no annotations/{wanted}; COCO's layout needs it, or use folder:{root}.")
    annotations = root / "annotations" / f"captions_{split}{year}.json"
    document = _read(annotations)
    captions: defaultdict[int, list[str]] = defaultdict(list)
    for annotation in document["annotations"]:
        # Some of COCO's captions contain line breaks.
        captions[annotation["image_id"]].append(" ".join(str(annotation["caption"]).split()))
    folder = root / f"{split}{year}"
    pictures = tuple(
        _picture(folder / image["file_name"], captions.pop(image["id"], []))
        for image in document["images"][: limit or len(document["images"])]
    )
    bare = sum(not picture.captions for picture in pictures)
    remarks = [f"{bare} pictures have no caption in {annotations.name}."] if bare else []
    if captions and limit is None:
        remarks.append(f"{len(captions)} captioned pictures of {annotations.name} are not among its images.")
    return Listing(pictures, tuple(remarks))


def _picture(path: Path, captions: list[str]) -> Picture:
    size = path.stat().st_size if path.is_file() else 0
    return Picture(path.stem, str(path), 0, size, None, tuple(captions))


def _read(annotations: Path) -> dict[str, list[dict]]:
    try:
        document = json.loads(annotations.read_text(encoding="utf-8"))
        if all(isinstance(document[key], list) for key in ("images", "annotations")):
            return document
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{annotations} is no COCO captions file: it needs the lists 'images' and 'annotations'.")
