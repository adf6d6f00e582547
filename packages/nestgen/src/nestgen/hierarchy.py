"""The hierarchy sheet (the paper's Figure 1): levels frozen from k up, the rest drawn anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nestgen.decode import load_decoder
from nestgen.files import write_json
from nestgen.models import load_models
from nestgen.recipe import Recipe
from nestgen.sample import describe, device, labels_of, sample_below
from nestgen.sheet import draw_sheet, write_picture


def hierarchy(recipe: Recipe, out: Path, columns: int, seed: int, vae: Path | None = None) -> None:
    """Writes the sheet to `out` and, beside it as .json, how much the pictures of each row vary.

    Image 0 of `seed` is drawn. The first row then draws every level anew, the next freezes the top one to image
    0's, ..., the last all but z_0. Column i draws with the noise of image i, so the first column is image 0.
    """
    models = load_models(recipe, device())
    decode = load_decoder(models[0].meta["codec"], vae, str(device()))
    images = range(columns)
    labels = labels_of(models, [0] * columns, seed, None)  # a row's pictures share image 0's class
    rows: list[np.ndarray] = []
    cards: list[dict[str, Any]] = []
    z = sample_below(models, images, seed, {}, labels)
    for lowest in tqdm(range(len(models), 0, -1), desc="rows", unit=" rows"):
        frozen = {level: z[level][:1].expand(columns, -1, -1, -1) for level in range(lowest, len(models))}
        drawn = sample_below(models, images, seed, frozen, labels) if frozen else z
        rows.append(decode(drawn[0]))
        cards.append({"frozen": sorted(frozen), "variation": variation(rows[-1])})
    titles = [_title(card["frozen"]) for card in cards]
    write_picture(draw_sheet(rows, titles), out)
    card = describe(recipe, models, columns, seed, columns, None)
    write_json(out.with_suffix(".json"), {"rows": cards, "samples": card})
    for title, one in zip(titles, cards):
        print(f"{title.replace(chr(10), ' '):28} variation {one['variation']:.2f} of 255")


def variation(pictures_NHWC: np.ndarray) -> float:
    """Standard deviation over the pictures, averaged over pixels and channels; in steps of 1/255."""
    return float(pictures_NHWC.astype(np.float64).std(axis=0).mean())


def _title(frozen: list[int]) -> str:
    return ", ".join(f"z_{level}" for level in frozen) + "\nfrozen" if frozen else "all drawn\nanew"
