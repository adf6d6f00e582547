"""COCO's layout: `<split><year>/` pictures and `annotations/captions_<split><year>.json`."""

from __future__ import annotations

import json
from collections import defaultdict

from featurize.errors import UserError
from featurize.io.addresses import existing_folder, exists, is_folder, read_text, walk
from featurize.sources.listing import Listing, Query, SourceImage

COUNTS = {
    "train2014": 82_783,
    "val2014": 40_504,
    "train2017": 118_287,
    "val2017": 5_000,
}


def list_coco(query: Query) -> Listing:
    """The pictures that the split's captions file names, in its order, with their captions, of the year that is there."""
    root = existing_folder(query.address)
    years = [year for year in (2014, 2017) if exists(f"{root}/annotations/captions_{query.split}{year}.json")]
    if not years:
        raise UserError(
            f"{root} has no annotations/captions_{query.split}2014.json or captions_{query.split}2017.json; COCO's layout needs "
            f"it, or use folder:{root}."
        )
    if len(years) > 1:
        raise UserError(f"{root} holds COCO 2014 and COCO 2017; name one: coco2014:{root} or coco2017:{root}.")
    return _list_year(root, query, years[0])


def list_coco_2014(query: Query) -> Listing:
    return _list_year(existing_folder(query.address), query, 2014)


def list_coco_2017(query: Query) -> Listing:
    return _list_year(existing_folder(query.address), query, 2017)


def _list_year(root: str, query: Query, year: int) -> Listing:
    """A picture that the file names and the folder lacks is listed all the same: the ledger says why it has no row."""
    name = f"{query.split}{year}"
    annotations = f"{root}/annotations/captions_{name}.json"
    images, captions = _read(annotations)
    if not is_folder(f"{root}/{name}"):
        raise UserError(f"The pictures' folder {root}/{name} is not there; {annotations} is.")
    files = dict(walk(f"{root}/{name}"))
    listed = []
    for image in images[: query.limit]:
        file = files.pop(image["file_name"], None)
        key = image["file_name"].rpartition(".")[0]
        where = (file.address, 0, file.size) if file else (f"{root}/{name}/{image['file_name']}", 0, 0)
        own_captions = tuple(captions.pop(image["id"], ()))
        listed.append(SourceImage(key, *where, None, own_captions, file.version if file else 0))
    if query.limit is not None:
        return Listing(tuple(listed))
    remarks = []
    if len(listed) != COUNTS[name]:
        remarks.append(f"{annotations} names {len(listed):,} pictures; COCO's {name} has {COUNTS[name]:,}.")
    if captions:
        remarks.append(f"{len(captions):,} captioned pictures of {annotations} are not among its images.")
    if files:
        first = min(files)
        remarks.append(
            f"{len(files):,} files in {root}/{name} are not in the captions file and were passed over (first: {first})."
        )
    return Listing(tuple(listed), tuple(remarks))


def _read(annotations: str) -> tuple[list[dict], dict[int, list[str]]]:
    """The images, and the captions by image id."""
    captions: defaultdict[int, list[str]] = defaultdict(list)
    try:
        document = json.loads(read_text(annotations))
        images = [{"id": image["id"], "file_name": str(image["file_name"])} for image in document["images"]]
        for annotation in document["annotations"]:
            # Some of COCO's captions contain line breaks.
            captions[annotation["image_id"]].append(" ".join(str(annotation["caption"]).split()))
    except FileNotFoundError:
        raise UserError(f"{annotations} is not there; COCO's captions belong to its layout.") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{annotations} is not a COCO captions file: it needs the lists 'images' and 'annotations'."
        ) from None
    return images, captions
