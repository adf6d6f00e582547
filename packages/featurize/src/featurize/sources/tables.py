"""Rows of the tables in which people keep labels and captions: CSV, JSON lines, and lines with tabs."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator

from featurize.errors import UserError
from featurize.io.addresses import read_text
from featurize.sources.outside_text import parse_json

NAME_COLUMNS = ("file_name", "filename", "file", "path", "image", "image_name", "key", "name")
TINY_IMAGENET = "val_annotations.txt"  # a name, a wnid and a box, with tabs between
CAPTION_NUMBER = re.compile(r"#\d+$")


def rows_of(address: str) -> Iterator[tuple[int, dict[str, object]]]:
    """(line number, {column: value}) of a table in any of the formats; column names in lower case.

    Raises UserError, with the line, for a table that can't be understood whole.
    """
    text = read_text(address)
    first = text.partition("\n")[0]
    if address.endswith(".jsonl"):
        return _of_json_lines(address, text)
    if address.rpartition("/")[2] == TINY_IMAGENET:
        return _of_tabs(address, text, "label")
    if address.endswith(".txt") and ("\t" in first or "," not in first):
        return _of_tabs(address, text, "caption")
    return _of_csv(address, text)


def _of_json_lines(address: str, text: str) -> Iterator[tuple[int, dict[str, object]]]:
    for number, line in _lines(text):
        try:
            parsed = parse_json(line)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            raise UserError(
                f'Line {number} of {address} is not a JSON object; each line must be one, like {{"file_name": ...}}.'
            )
        yield number, {str(key).lower(): value for key, value in parsed.items()}


def _of_tabs(address: str, text: str, column: str) -> Iterator[tuple[int, dict[str, object]]]:
    """Flickr30k's `picture.jpg#0 <tab> caption`; of Tiny-ImageNet's lines the name and the wnid after it."""
    for number, line in _lines(text):
        name, tab, value = line.strip("\r\n").partition("\t")
        if not tab:
            raise UserError(f"Line {number} of {address} has no tab; each line is an image's name, a tab, a {column}.")
        value = value.partition("\t")[0] if column == "label" else value
        yield number, {"file_name": CAPTION_NUMBER.sub("", name), column: value}


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers. Unlike `str.splitlines`, only line breaks end one."""
    return ((number, line) for number, line in enumerate(io.StringIO(text), 1) if line.strip())


def _of_csv(address: str, text: str) -> Iterator[tuple[int, dict[str, object]]]:
    """Each row must have the columns of the first line: a comma or quote too many would shift or swallow the rest."""
    # Strict, so that a quote that is not closed is an error and does not take the rest of the file for one field.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[str] = []
    line = 1
    try:
        for fields in reader:
            if not columns:
                columns = [field.strip().lower() for field in fields]
                _check_columns(address, columns)
            elif fields and len(fields) != len(columns):
                raise UserError(
                    f"Line {line} of {address} has {len(fields)} fields and the first line {len(columns)}; put fields with "
                    'commas in quotes, like a.jpg,"one, two".'
                )
            elif fields:
                yield line, dict(zip(columns, fields, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"The row from line {line} on of {address} is not valid CSV ({error}); quotes must be in pairs, and those in a "
            "field doubled."
        ) from None
    if not columns:
        _check_columns(address, columns)


def _check_columns(address: str, columns: list[str]) -> None:
    if not set(columns) & set(NAME_COLUMNS):
        raise UserError(
            f"{address} has no column named {' or '.join(NAME_COLUMNS[:3])}; its first line names the columns, like "
            "file_name,label."
        )
    twice = next((column for column in columns if column and columns.count(column) > 1), None)
    if twice:
        raise UserError(f"{address} has two columns named {twice}; rename one.")
