"""COCO's layout: `<split><year>/` pictures and `annotations/captions_<split><year>.json`."""

from __future__ import annotations

from collections import defaultdict

from featurize.errors import UserError
from featurize.io.addresses import address_of, existing_folder, exists, is_folder, read_text, walk
from featurize.sources.listing import Listing, Query, SourceImage
from featurize.sources.outside_text import Oddities, captions_in, parse_json, printable, same_form

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
    odd = Oddities()
    images, captions = _read(annotations, odd)
    if not is_folder(f"{root}/{name}"):
        raise UserError(f"The pictures' folder {root}/{name} is not there; {annotations} is.")
    files = {same_form(path): file for path, file in walk(f"{root}/{name}") if file.is_plain}
    listed = []
    for file_name in list(images)[: query.limit]:
        file = files.pop(same_form(file_name), None)
        where = (file.address, 0, file.size) if file else (address_of(f"{root}/{name}/{file_name}"), 0, 0)
        own_captions = tuple(caption for id_ in images[file_name] for caption in captions.pop(id_, ()))
        key = printable(file_name.rpartition(".")[0] or file_name)
        listed.append(SourceImage(key, *where, None, own_captions, file.version if file else 0))
    if query.limit is not None:
        return Listing(tuple(listed))
    remarks = odd.remarks
    if len(listed) != COUNTS[name]:
        remarks.append(f"{annotations} names {len(listed):,} pictures; COCO's {name} has {COUNTS[name]:,}.")
    if captions:
        remarks.append(f"{len(captions):,} captioned pictures of {annotations} are not among its images.")
    if files:
        first = printable(min(files))
        remarks.append(
            f"{len(files):,} files in {root}/{name} are not in the captions file and were passed over (first: {first})."
        )
    return Listing(tuple(listed), tuple(remarks))


def _read(annotations: str, odd: Oddities) -> tuple[dict[str, list[str]], dict[str, tuple[str, ...]]]:
    """The ids of each image by its file name, in order, and the captions by image id. An id may be a number or its digits."""
    images: dict[str, list[str]] = {}
    names: dict[str, str] = {}  # by id
    captions: defaultdict[str, tuple[str, ...]] = defaultdict(tuple)
    try:
        document = parse_json(read_text(annotations))
        if not isinstance(document, dict):
            raise TypeError
        for image in document["images"]:
            file_name, id_ = image["file_name"], _id(image["id"])
            if not isinstance(file_name, str) or not file_name:
                raise TypeError
            if names.setdefault(id_, file_name) != file_name:
                raise UserError(
                    f"{annotations} gives the id {id_} to {names[id_]} and to {printable(file_name)}; give each its own."
                )
            if file_name in images:
                odd.add(f"images stand in {annotations} more than once, and were taken once", printable(file_name))
            images.setdefault(file_name, []).append(id_)
        for annotation in document["annotations"]:
            id_ = _id(annotation["image_id"])
            # Some of COCO's captions contain line breaks.
            captions[id_] += captions_in(annotation["caption"], f"image {id_} in {annotations}", odd)
    except FileNotFoundError:
        raise UserError(f"{annotations} is not there; COCO's captions belong to its layout.") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{annotations} is not a COCO captions file: it needs the lists 'images' and 'annotations'."
        ) from None
    return images, dict(captions)


def _id(value: object) -> str:
    """An id as text: 7, 7.0 and "7" are one. Raises TypeError for what is neither a number nor text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return printable(str(value).strip())
