"""What each level finds alike: a sheet of nearest neighbours per level, and how often labels agree."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from featurize.errors import UserError
from featurize.files import replacing, write_json
from featurize.ledger import Ledger, read_ledger
from featurize.neighbours import label_agreement, nearest, without_self
from featurize.pictures import crop, decode
from featurize.recipe import parse_shape
from featurize.sources import read
from featurize.store import folder_name, is_sealed, open_sealed, read_rows

PIXEL_SIDE      = 32  # of the raw-pixel baseline                                          # fmt: skip
DUPLICATE       = 0.98  # correlation of pixels from which two pictures count as the same    # fmt: skip
AGREEMENT_AT    = 10  # neighbours a query                                                 # fmt: skip
THUMBNAIL       = 88  # fmt: skip
MARGIN          = 92  # fmt: skip
CAPTION_HEIGHT  = 15  # fmt: skip


@dataclass(frozen=True)
class Space:
    """A space in which pictures are compared: its name, and a vector a picture."""

    name: str
    vectors_ND: np.ndarray


def knn_viz(
    root: Path, encoder: str, out: Path, queries: int, neighbours: int, max_rows: int, seed: int
) -> dict[str, float | None]:
    """Write the sheet `out` and the numbers beside it (`.json`); the label agreement per space.

    `max_rows` rows, chosen by keyed hash, are compared with each other in every space, so the numbers are comparable.
    """
    ledger = read_ledger(root)
    if ledger.rows < 3:
        raise UserError(f"{root} holds {ledger.rows} rows; neighbours need three at least.")
    chosen = _by_hash(ledger, seed)[:max_rows]
    rows = np.array(sorted(chosen))
    spaces = [*_level_spaces(root, encoder, rows), _pixel_space(ledger, rows)]
    labels = ledger.labels[rows]
    asked = np.flatnonzero(np.isin(rows, np.array(chosen[:1000])))
    shown = _various([int(np.flatnonzero(rows == row)[0]) for row in chosen[:1000]], labels, queries)

    agreement: dict[str, float | None] = {}
    found: dict[str, np.ndarray] = {}
    near_pixels = spaces[-1].vectors_ND
    for space in spaces:
        _, near = nearest(space.vectors_ND, space.vectors_ND[asked], AGREEMENT_AT + 1)
        agreement[space.name] = label_agreement(
            labels, asked, without_self(asked, near, min(AGREEMENT_AT, len(rows) - 1))
        )
        _, near = nearest(space.vectors_ND, space.vectors_ND[shown], neighbours * 4 + 1)
        found[space.name] = _without_duplicates(np.array(shown), near, near_pixels, neighbours)
    _draw(ledger, rows, shown, found, out, neighbours)
    chance = None if (labels < 0).all() else float(sum(np.mean(labels == label) ** 2 for label in np.unique(labels)))
    write_json(
        out.with_suffix(".json"),
        {
            "root": str(root),
            "encoder": encoder,
            "rows": len(rows),
            "queries": len(asked),
            "neighbours": AGREEMENT_AT,
            "label_agreement": agreement,
            "chance": chance,
        },
    )
    return agreement | {"chance": chance}


def _by_hash(ledger: Ledger, seed: int) -> list[int]:
    """All rows in an order that depends on their keys and the seed only."""
    return sorted(range(ledger.rows), key=lambda row: sha256(f"{seed}:{ledger.pictures[row].key}".encode()).digest())


def _various(candidates: list[int], labels: np.ndarray, count: int) -> list[int]:
    """The first candidates, of as many different labels as there are."""
    first = list({int(labels[row]): row for row in reversed(candidates)}.values())[::-1]
    return (first + [row for row in candidates if row not in first])[:count]


def _level_spaces(root: Path, encoder: str, rows: np.ndarray) -> list[Space]:
    folder = root / folder_name(encoder)
    base = open_sealed(folder / "base.zarr")
    h, w = base.shape[2:4]
    spaces = [Space(f"mean of {h}x{w}", read_rows(base, rows, view=0).astype(np.float32).mean(axis=(1, 2)))]
    shapes = [parse_shape(path.stem) for path in folder.glob("*x*x*.zarr") if is_sealed(path)]
    for shape in sorted(shapes, key=lambda shape: shape[0] * shape[1], reverse=True):
        name = "x".join(map(str, shape))
        level = open_sealed(folder / f"{name}.zarr")
        # Compared as the encoder scales the channels: standardised, the faint trailing ones would drown the others.
        values = read_rows(level, rows, view=0).astype(np.float32) * np.array(level.attrs["std"], dtype=np.float32)
        spaces.append(Space(name, values.reshape(len(rows), -1)))
    return spaces


def _pixel_space(ledger: Ledger, rows: np.ndarray) -> Space:
    pixels = np.empty((len(rows), PIXEL_SIDE * PIXEL_SIDE * 3), dtype=np.float32)
    for index, row in enumerate(tqdm(rows, desc="reading pixels", unit=" pictures")):
        pixels[index] = _thumbnail(ledger, int(row), PIXEL_SIDE).reshape(-1)
    return Space("raw pixels", pixels - pixels.mean(axis=1, keepdims=True))


def _thumbnail(ledger: Ledger, row: int, side: int) -> np.ndarray:
    return crop(decode(read(ledger.pictures[row])), ledger.boxes[row], side, "bicubic")


def _without_duplicates(rows_Q: np.ndarray, found_QK: np.ndarray, pixels_ND: np.ndarray, keep: int) -> np.ndarray:
    """(Q, keep) neighbours that are neither the query nor nearly the same picture; -1 where too few are left."""
    unit = pixels_ND / np.maximum(np.linalg.norm(pixels_ND, axis=1, keepdims=True), 1e-12)
    kept = np.full((len(rows_Q), keep), -1)
    for query, (row, found) in enumerate(zip(rows_Q, found_QK, strict=True)):
        others = [other for other in found if other != row and float(unit[row] @ unit[other]) < DUPLICATE][:keep]
        kept[query, : len(others)] = others
    return kept


def _draw(
    ledger: Ledger,
    rows: np.ndarray,
    shown: list[int],
    found: dict[str, np.ndarray],
    out: Path,
    neighbours: int,
) -> None:
    """For each query a band with a line per space: the space's name, the query, its neighbours, their labels below."""
    cell = THUMBNAIL + 4
    line = cell + CAPTION_HEIGHT
    band = line * len(found) + 14
    sheet = Image.new("RGB", (MARGIN + cell * (neighbours + 1) + 12, band * len(shown)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    for query, row in enumerate(shown):
        for position, (name, near) in enumerate(found.items()):
            top = query * band + position * line
            draw.text((6, top + THUMBNAIL // 2 - 6), name, fill="black", font=font)
            for column, index in enumerate([row, *near[query]]):
                if index < 0:
                    continue
                left = MARGIN + column * cell + (8 if column else 0)
                picture = Image.fromarray(_thumbnail(ledger, int(rows[index]), THUMBNAIL))
                sheet.paste(picture, (left, top))
                if column == 0:
                    draw.rectangle((left - 1, top - 1, left + THUMBNAIL, top + THUMBNAIL), outline="crimson", width=2)
                draw.text((left, top + THUMBNAIL + 1), _legend(ledger, int(rows[index])), fill="dimgray", font=font)
        draw.line((0, (query + 1) * band - 6, sheet.width, (query + 1) * band - 6), fill="lightgray")
    with replacing(out) as temporary:
        sheet.save(temporary, format="PNG")


def _legend(ledger: Ledger, row: int) -> str:
    picture = ledger.pictures[row]
    text = picture.captions[0] if picture.captions else "" if picture.label is None else f"class {picture.label}"
    return text if len(text) <= 14 else text[:13] + "…"
