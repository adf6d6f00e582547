"""Text for people: tables, and values short enough for a message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lines of columns two spaces apart: the first column flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    )


def short(value: object) -> str:
    """A value in at most 39 characters: of longer ones, such as digests, the first 12."""
    text = str(value)
    return text if len(text) < 40 else f"{text[:12]}..."


def flatten(document: Any, name: str = "") -> dict[str, Any]:
    """The leaves of a JSON document by their dotted path: {"z_1.guidance": 1.0}."""
    if not isinstance(document, Mapping):
        return {name: document}
    items = [(f"{name}.{key}" if name else str(key), value) for key, value in document.items()]
    return {path: leaf for key, value in items for path, leaf in flatten(value, key).items()}


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first leaf that differs between two JSON documents: `z_1.guidance was 1.0 and is 0.5`."""
    before, after = flatten(old), flatten(new)
    names = [name for name in (*after, *before) if before.get(name) != after.get(name)]
    name = names[0] if names else "its card"
    return f"{name} was {short(before.get(name))} and is {short(after.get(name))}"
