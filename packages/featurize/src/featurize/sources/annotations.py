"""Labels and captions beside the images of a folder, in the formats people use."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from featurize.errors import UserError
from featurize.io.addresses import File, exists, find, read_range
from featurize.sources.listing import SourceImage
from featurize.sources.outside_text import Oddities, captions_in, label_of, printable, same_form
from featurize.sources.tables import NAME_COLUMNS, TINY_IMAGENET, rows_of

ANNOTATION_FILES = (
    "labels.csv", "captions.txt", "captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl", TINY_IMAGENET,
)  # fmt: skip
LABEL_COLUMNS = ("label", "class")
CAPTION_COLUMNS = ("captions", "caption", "text", "comment")
MAX_CAPTION = 16 << 20  # bytes of the file of one


@dataclass(frozen=True)
class Annotations:
    """Labels and captions of images, by path below the folder or by path without extension, in Unicode's composed form.

    `classes` are the names of the labels, where they have names.
    """

    files: tuple[str, ...]
    named: frozenset[str]
    labels: dict[str, int]
    classes: tuple[str, ...]
    captions: dict[str, list[str]]
    remarks: tuple[str, ...]


def read_annotations(root: str, files: dict[str, File] | None) -> Annotations | None:
    """All annotations of the folder `root` put together; None without any. `files` are its annotation files, if known.

    Labels are whole numbers (a negative one means none), or names, which are numbered in sorted order. Raises UserError for a
    file that can't be understood and for a picture with two labels.
    """
    if files is None:
        files = {name: find(f"{root}/{name}") for name in ANNOTATION_FILES if exists(f"{root}/{name}")}
    if not files:
        return None
    labels: dict[str, tuple[str, str]] = {}  # a label as text, and where it stands
    captions: defaultdict[str, list[str]] = defaultdict(list)
    named: set[str] = set()
    odd = Oddities()
    for file in files.values():
        for line, row in rows_of(file.address):
            where = f"line {line} of {file.address}"
            name = _name(row)
            if not name:
                raise UserError(
                    f"L{where[1:]} names no image; the file needs a column {' or '.join(NAME_COLUMNS[:3])}."
                )
            named.add(name)
            label = _first(row, LABEL_COLUMNS)
            if label is not None:
                text = same_form(printable(str(label).strip()))
                earlier, _ = labels.setdefault(name, (text, where))
                if earlier != text:
                    raise UserError(
                        f"L{where[1:]} gives {name} the label {text}, an earlier one {earlier}; keep one of them."
                    )
            caption = _first(row, CAPTION_COLUMNS)
            captions[name] += captions_in(caption, where, odd) if caption is not None else ()
    numbers, classes, remarks = _numbered(labels)
    return Annotations(tuple(files), frozenset(named), numbers, classes, dict(captions), (*remarks, *odd.remarks))


def annotate(
    images: Sequence[SourceImage], annotations: Annotations, root: str, whole: bool
) -> tuple[list[SourceImage], list[str]] | None:
    """The images with the labels and captions that the annotations give for their path, with or without its extension, and
    remarks. Where no name is a path, names are matched by their last part, if each is the name of one image only.

    Without `whole`, `images` are not all of the folder: None where none of them is named. Raises UserError where none of all
    images is.
    """
    names = [_match((image.key, _stem(image.key)), annotations.named) for image in images]
    remarks = list(annotations.remarks)
    if not any(names) and annotations.named:
        if not whole:
            return None
        names = _by_last_part(images, annotations, root)
        remarks.append(
            f"The names in {', '.join(annotations.files)} are no paths below {root}; they were matched by their last part."
        )
    unused = annotations.named.difference(names)
    if unused and whole:
        remarks.append(
            f"{len(unused):,} names in {', '.join(annotations.files)} are of no picture (first: {_one_line(min(unused))})."
        )
    annotated = [
        replace(
            image,
            label=annotations.labels.get(name) if annotations.labels else image.label,
            captions=tuple(annotations.captions.get(name, ())),
        )
        for image, name in zip(images, names, strict=True)
    ]
    return annotated, remarks


def _by_last_part(images: Sequence[SourceImage], annotations: Annotations, root: str) -> list[str]:
    """The name of each image, "" where there is none, by the last part of both."""
    by_last: defaultdict[str, list[str]] = defaultdict(list)
    for name in annotations.named:
        by_last[re.split(r"[/\\]", name)[-1]].append(name)
    matched: dict[str, str] = {}  # the key of the image that has a name
    names = []
    for image in images:
        last = image.key.rpartition("/")[2]
        (name, *others) = by_last.get(_match((last, _stem(last)), by_last), [""])
        if others or (name and name in matched):
            raise UserError(
                f"The names in {', '.join(annotations.files)} are no paths below {root}, and by their last part they are not "
                f"unique ({others[0] if others else matched[name]} and {name if others else image.key}); write paths like "
                f"{images[0].key}."
            )
        matched |= {name: image.key} if name else {}
        names.append(name)
    if not matched:
        raise UserError(
            f"None of the {len(annotations.named):,} names in {', '.join(annotations.files)} is of a picture in {root} (first: "
            f"{min(annotations.named)}); write paths like {images[0].key}, or move the file away."
        )
    return names


def _one_line(name: str) -> str:
    """A name from a table as a remark shows it: it may hold line breaks."""
    return " ".join(name.split())


def _match(forms: Iterable[str], names: frozenset[str] | dict[str, list[str]]) -> str:
    return next((form for form in map(same_form, forms) if form in names), "")


def _stem(key: str) -> str:
    return key.rpartition(".")[0]


def read_sidecar(file: File) -> bytes:
    """The text file beside an image. Raises UserError for one too long to be a caption."""
    if file.size > MAX_CAPTION:
        raise UserError(
            f"{file.address} is beside an image, but with {file.size:,} bytes it is no caption; move it away."
        )
    return read_range(file.address, 0, file.size)


def _numbered(labels: dict[str, tuple[str, str]]) -> tuple[dict[str, int], tuple[str, ...], list[str]]:
    """Labels by name, the names of labels that are no numbers, and remarks."""
    if all(_is_number(text) for text, _ in labels.values()):
        numbers: dict[str, int] = {}
        for name, (text, where) in labels.items():
            try:
                number = label_of(text)
            except ValueError as error:
                raise UserError(
                    f"L{where[1:]} gives the label {text[:40]}, but {error}; write whole numbers, or names."
                ) from None
            numbers |= {name: number} if number is not None else {}
        return numbers, (), []
    classes = sorted({text for text, _ in labels.values()})
    by_text = {text: number for number, text in enumerate(classes)}
    shown = ", ".join(f"{_one_line(text)} = {number}" for text, number in list(by_text.items())[:3])
    remark = f"The {len(classes)} labels are names, numbered in sorted order ({shown}, ...)."
    return {name: by_text[text] for name, (text, _) in labels.items()}, tuple(classes), [remark]


def _is_number(text: str) -> bool:
    """Whether a label is meant as a number: a fraction, which is an error, as well."""
    return re.fullmatch(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?", text) is not None


def _name(row: dict[str, object]) -> str:
    name = str(_first(row, NAME_COLUMNS) or "").strip()
    return same_form(printable(name.removeprefix("./")))


def _first(row: dict[str, object], columns: tuple[str, ...]) -> object:
    return next((row[column] for column in columns if row.get(column) not in (None, "")), None)
