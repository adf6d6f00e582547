"""The sheet of neighbours: a band a query, a panel an encoder, a line a space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from featurize.io.files import atomic_write
from featurize.sources import SourceImage

THUMBNAIL = 88
GAP = 4
MARGIN = 96  # for the name of a line
TITLE_HEIGHT = 22
LINE_HEIGHT = 13  # of text
CAPTION_LINES = 3
SAME, OTHER, PLAIN = "#0a7d28", "#b03030", "dimgray"  # of the query's label, of another, without labels


@dataclass(frozen=True)
class Line:
    """The neighbours of every query in one space: positions (Q, K), -1 where there is none."""

    name: str
    neighbours_QK: np.ndarray


@dataclass(frozen=True)
class Panel:
    """Lines that stand under each other, with a title."""

    title: str
    lines: tuple[Line, ...]


def draw_sheet(
    panels: list[Panel],
    queries: np.ndarray,
    image_of: Callable[[int], SourceImage],
    thumbnail_of: Callable[[int], np.ndarray],
    out: Path,
    classes: Sequence[str] = (),
) -> None:
    """For each query a band: in every panel the lines' names at the left, the query framed, its neighbours after it.

    Labels or captions stand below; a label is green where it is the query's and red where it is not.
    `image_of` and `thumbnail_of` (uint8, THUMBNAIL a side) give what stands at a position; `classes` are the labels'
    names, where they have names.
    """
    cell = THUMBNAIL + GAP
    neighbours = panels[0].lines[0].neighbours_QK.shape[1]
    captioned = any(image_of(int(query)).captions for query in queries)
    text_lines = CAPTION_LINES if captioned else 1
    line_height = THUMBNAIL + GAP + LINE_HEIGHT * text_lines
    band = line_height * max(len(panel.lines) for panel in panels) + 14
    width = MARGIN + cell * (neighbours + 1) + 20
    sheet = Image.new("RGB", (width * len(panels), TITLE_HEIGHT + band * len(queries)), "white")
    draw = ImageDraw.Draw(sheet)
    font, bold = ImageFont.load_default(size=11), ImageFont.load_default(size=14)
    for column, panel in enumerate(panels):
        x0 = column * width
        draw.text((x0 + 6, 3), panel.title, fill="black", font=bold)
        for number, query in enumerate(queries):
            query_image = image_of(int(query))
            for position, line in enumerate(panel.lines):
                y0 = TITLE_HEIGHT + number * band + position * line_height
                name = "\n".join(_wrapped(line.name, font, MARGIN - 10, 3))
                draw.text((x0 + 6, y0 + THUMBNAIL // 2 - 8), name, fill="black", font=font)
                for place, index in enumerate([int(query), *map(int, line.neighbours_QK[number])]):
                    if index < 0:
                        continue
                    left = x0 + MARGIN + place * cell + (8 if place else 0)
                    sheet.paste(Image.fromarray(thumbnail_of(index)), (left, y0 + 2))
                    if place == 0:
                        edges = (left - 1, y0 + 1, left + THUMBNAIL, y0 + 2 + THUMBNAIL)
                        draw.rectangle(edges, outline="crimson", width=2)
                    image = image_of(index)
                    text = "\n".join(_wrapped(_legend(image, classes), font, THUMBNAIL, text_lines))
                    at = (left, y0 + THUMBNAIL + GAP)
                    draw.text(at, text, fill=_colour(query_image, image) if place else PLAIN, font=font, spacing=1)
    for number in range(1, len(queries)):
        y = TITLE_HEIGHT + number * band - 7
        draw.line((0, y, sheet.width, y), fill="lightgray")
    for column in range(1, len(panels)):
        draw.line((column * width - 8, 0, column * width - 8, sheet.height), fill="lightgray")
    with atomic_write(out) as temporary:
        sheet.save(temporary, format="PNG")


def _legend(image: SourceImage, classes: Sequence[str]) -> str:
    if image.captions or image.label is None:
        return image.captions[0] if image.captions else ""
    return classes[image.label] if 0 <= image.label < len(classes) else f"class {image.label}"


def _colour(query: SourceImage, neighbour: SourceImage) -> str:
    if query.label is None or neighbour.label is None:
        return PLAIN
    return SAME if query.label == neighbour.label else OTHER


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, lines: int) -> list[str]:
    """The text broken between words into at most so many lines of `width` pixels, cut with an ellipsis."""
    broken: list[str] = []
    for word in text.split():
        longer = f"{broken[-1]} {word}" if broken else word
        if broken and font.getlength(longer) <= width:
            broken[-1] = longer
        else:
            broken.append(word)
    cut = broken[:lines]
    if len(broken) > lines:
        cut[-1] += " …"
    for index, line in enumerate(cut):
        while font.getlength(line) > width and len(line) > 2:
            line = line.rstrip("…").rstrip()[:-1] + "…"
        cut[index] = line
    return cut
