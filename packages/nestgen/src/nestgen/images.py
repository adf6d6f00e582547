"""The images of a sample folder, and sheets: rows of images in one, with a title in the margin of each row."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nestgen.errors import UserError
from nestgen.files import atomic_write

LAST_CHUNK = b"\0\0\0\0IEND\xaeB`\x82"  # of every PNG: no bytes, and their checksum
GAP = 4  # pixels between images
CELL = 96  # smaller images are enlarged by a whole factor to at most this side, so that 32 px can be seen


def draw_sheet(rows: Sequence[np.ndarray], titles: Sequence[str] = ()) -> Image.Image:
    """One image of the rows, each uint8 (columns, height, width, 3); only the number of columns may differ between rows.

    `titles`, one per row or none at all, may hold line breaks and stand in a margin at the left.
    """
    height, width = rows[0].shape[1:3]
    factor = max(1, CELL // max(height, width))
    height, width = height * factor, width * factor
    font = ImageFont.load_default(15)
    margin = _margin(titles, font) if titles else 0
    columns = max(len(row) for row in rows)
    size = (margin + GAP + columns * (width + GAP), GAP + len(rows) * (height + GAP))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for index, row in enumerate(rows):
        top = GAP + index * (height + GAP)
        if titles:
            draw.text((2 * GAP, top + height // 2), titles[index], fill="black", font=font, anchor="lm")
        for column, image in enumerate(row):
            enlarged = np.repeat(np.repeat(image, factor, axis=0), factor, axis=1)
            sheet.paste(Image.fromarray(enlarged), (margin + GAP + column * (width + GAP), top))
    return sheet


def _margin(titles: Sequence[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    """Width in pixels that the widest title needs."""
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    return 3 * GAP + max(round(draw.multiline_textbbox((0, 0), title, font=font)[2]) for title in titles)


def folders_sheet(folders: Sequence[Path], titles: Sequence[str], count: int) -> Image.Image:
    """A row for each sample folder: its first `count` images. The same seeds stand under each other.

    Raises UserError for a folder with fewer images, and for images of different sizes.
    """
    rows = [read_images(folder, count) for folder in folders]
    for folder, row in zip(folders, rows):
        if row.shape != rows[0].shape:
            raise UserError(
                f"{folder} holds images of {row.shape[2]}x{row.shape[1]} pixels and {folders[0]} of "
                f"{rows[0].shape[2]}x{rows[0].shape[1]}; a sheet takes one size"
            )
    return draw_sheet(rows, titles)


def image_path(folder: Path, index: int) -> Path:
    """Path of image `index`: 000000.png, 000001.png, ..."""
    return folder / f"{index:06d}.png"


def is_whole(path: Path) -> bool:
    """Whether a PNG is there to its last chunk: after a power cut it may be empty or cut short."""
    try:
        with path.open("rb") as file:
            file.seek(-len(LAST_CHUNK), os.SEEK_END)
            return file.read() == LAST_CHUNK
    except OSError:  # not there, or shorter than that
        return False


def read_images(folder: Path, count: int) -> np.ndarray:
    """Images 0 to count - 1 of a sample folder, uint8 (count, height, width, 3).

    Raises UserError for one that is missing, damaged or of another size than those before it.
    """
    images = []
    for index in range(count):
        path = image_path(folder, index)
        if not path.is_file():
            raise UserError(f"{folder} has no {path.name}; run `nestgen sample` with --count {count} or more")
        try:
            with Image.open(path) as image:
                image.verify()  # the checksums of its chunks, which decoding does not look at
            with Image.open(path) as image:
                images.append(np.asarray(image.convert("RGB")))
        except (OSError, SyntaxError, ValueError):  # the last two are Pillow's for wrong checksums and lengths
            raise UserError(f"{path} is damaged; remove it and run `nestgen sample` again") from None
        if images[-1].shape != images[0].shape:
            raise UserError(f"{path} has another size than the images before it; sample into an empty folder")
    return np.stack(images)


def write_image(image: Image.Image | np.ndarray, path: Path) -> None:
    """Writes a PNG of an image, or of uint8 (height, width, 3)."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    with atomic_write(path, durable=False) as temporary:  # two waits for the disk per image would be most of the time
        image.save(temporary, format="PNG")
