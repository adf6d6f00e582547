"""Labels and captions beside the images of a folder, in the formats people use."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from featurize.errors import UserError
from featurize.io.addresses import File, exists, find, read_text

ANNOTATION_FILES = (
    "labels.csv", "captions.txt", "captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl",
)  # fmt: skip
NAME_COLUMNS = ("file_name", "filename", "file", "path", "image", "image_name", "key", "name")
LABEL_COLUMNS = ("label", "class")
CAPTION_COLUMNS = ("captions", "caption", "text", "comment")


@dataclass(frozen=True)
class Annotations:
    """Labels and captions of images, by path below the folder or by path without extension."""

    files: tuple[str, ...]
    named: frozenset[str]
    labels: dict[str, int]
    captions: dict[str, list[str]]
    remarks: tuple[str, ...]


def read_annotations(root: str, files: dict[str, File] | None) -> Annotations | None:
    """All annotations of the folder `root` put together; None without any. `files` are its annotation files, if known.

    Labels are integers (a negative one means none), or names, which are numbered in sorted order. Raises UserError for a
    file that can't be understood and for a picture with two labels.
    """
    if files is None:
        files = {name: find(f"{root}/{name}") for name in ANNOTATION_FILES if exists(f"{root}/{name}")}
    if not files:
        return None
    label_texts: dict[str, str] = {}
    captions: defaultdict[str, list[str]] = defaultdict(list)
    named: set[str] = set()
    for file in files.values():
        for line, row in _rows(file):
            where = f"Line {line} of {file.address}"
            name = str(_first(row, NAME_COLUMNS) or "").strip().removeprefix("./")
            if not name:
                raise UserError(f"{where} names no image; the file needs a column {' or '.join(NAME_COLUMNS[:3])}.")
            named.add(name)
            label = _first(row, LABEL_COLUMNS)
            if label is not None and label_texts.setdefault(name, str(label).strip()) != str(label).strip():
                raise UserError(
                    f"{where} gives {name} the label {label}, an earlier one {label_texts[name]}; keep one of them."
                )
            caption = _first(row, CAPTION_COLUMNS)
            listed = caption if isinstance(caption, list) else [caption]
            captions[name] += [" ".join(str(text).split()) for text in listed if text]
    labels, remark = _numbered(label_texts)
    return Annotations(tuple(files), frozenset(named), labels, dict(captions), (remark,) if remark else ())


def sidecar_caption(file: File) -> tuple[str, ...]:
    """The text of a file beside an image, on one line: its one caption."""
    text = " ".join(read_text(file.address).split())
    return (text,) if text else ()


def _numbered(label_texts: dict[str, str]) -> tuple[dict[str, int], str]:
    if all(label.removeprefix("-").isdecimal() for label in label_texts.values()):
        return {name: int(label) for name, label in label_texts.items() if int(label) >= 0}, ""
    names = sorted(set(label_texts.values()))
    numbers = {label: number for number, label in enumerate(names)}
    shown = ", ".join(f"{label} = {number}" for label, number in list(numbers.items())[:3])
    remark = f"The {len(names)} labels are names, numbered in sorted order ({shown}, ...)."
    return {name: numbers[label] for name, label in label_texts.items()}, remark


def _first(row: dict[str, object], columns: tuple[str, ...]) -> object:
    return next((row[column] for column in columns if row.get(column) not in (None, "")), None)


def _rows(file: File) -> Iterator[tuple[int, dict[str, object]]]:
    """(line number, {column: value}) of a table in any of the formats; column names in lower case."""
    text = read_text(file.address)
    first = text.partition("\n")[0]
    if file.address.endswith(".jsonl"):
        for number, line in enumerate(io.StringIO(text), 1):
            if line.strip():
                yield number, _object(file, number, line)
    elif file.address.endswith(".txt") and ("\t" in first or "," not in first):
        # Flickr30k's way: `picture.jpg#0 <tab> caption`.
        for number, line in enumerate(io.StringIO(text), 1):
            name, tab, caption = line.strip().partition("\t")
            if name and not tab:
                raise UserError(
                    f"Line {number} of {file.address} has no tab; each line is an image's name, a tab, a caption."
                )
            if tab:
                yield number, {"file_name": name.rpartition("#")[0] or name, "caption": caption}
    else:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        columns = [(column or "").strip().lower() for column in reader.fieldnames or ()]
        reader.fieldnames = columns
        if not set(columns) & set(NAME_COLUMNS):
            raise UserError(
                f"{file.address} has no column named {' or '.join(NAME_COLUMNS[:3])}; its first line names the columns, "
                "like file_name,label."
            )
        for row in reader:
            yield reader.line_num, dict(row)


def _object(file: File, number: int, line: str) -> dict[str, object]:
    try:
        parsed = json.loads(line)
        if isinstance(parsed, dict):
            return {str(key).lower(): value for key, value in parsed.items()}
    except ValueError:
        pass
    raise UserError(
        f'Line {number} of {file.address} is not a JSON object; each line must be one, like {{"file_name": ...}}.'
    )
