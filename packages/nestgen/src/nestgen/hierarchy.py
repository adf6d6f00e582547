"""The hierarchy sheet (the paper's Figure 1): levels frozen from k up, the rest drawn anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nestgen.cards import Request, describe
from nestgen.decode import load_decoder
from nestgen.draw import device, labels_of, sample_below
from nestgen.files import write_json
from nestgen.models import load_models
from nestgen.recipe import Recipe
from nestgen.sheet import draw_sheet, write_picture

FROZEN = 4  # samples frozen in turn: one alone makes the variation too uncertain to see it fall


def hierarchy(recipe: Recipe, out: Path, columns: int, seed: int, vae: Path | None = None) -> None:
    """Writes the sheet to `out` and, beside it as .json, how much the pictures of each row vary.

    The first row draws every level anew, the next freezes the top one to a sample's, ..., the last all but z_0.
    Column i draws with the noise of image i of `seed`; the sample frozen is image 0, so the first column is that
    image. The variation is averaged over freezing images 0, 1, ... in turn.
    """
    models = load_models(recipe, device())
    decode = load_decoder(models[0].weights.meta["codec"], vae, str(device()))
    images, turns = list(range(columns)), min(columns, FROZEN)
    labels = labels_of(models, [0] * columns * turns, seed, None)  # all pictures share image 0's class
    z = sample_below(models, images, seed, {}, None if labels is None else labels[:columns])
    rows = [decode(z[0])]
    cards: list[dict[str, Any]] = [{"frozen": [], "variation": variation(rows[0])}]
    for lowest in tqdm(range(len(models) - 1, 0, -1), desc="rows", unit=" rows"):
        levels = range(lowest, len(models))
        frozen = {level: z[level][:turns].repeat_interleave(columns, 0) for level in levels}
        drawn = sample_below(models, images * turns, seed, frozen, labels)
        by_turn = np.split(decode(drawn[0]), turns)
        rows.append(by_turn[0])
        cards.append({"frozen": list(levels), "variation": float(np.mean([variation(one) for one in by_turn]))})
    titles = [_title(card["frozen"]) for card in cards]
    write_picture(draw_sheet(rows, titles), out)
    card = describe(recipe, models, Request(columns, seed, columns))
    write_json(out.with_suffix(".json"), {"rows": cards, "samples": card})
    for title, one in zip(titles, cards):
        print(f"{title.replace(chr(10), ' '):<28} variation {one['variation']:.2f} of 255")


def variation(pictures_NHWC: np.ndarray) -> float:
    """Standard deviation over the pictures, averaged over pixels and channels; in steps of 1/255."""
    return float(pictures_NHWC.astype(np.float64).std(axis=0).mean())


def _title(frozen: list[int]) -> str:
    return ", ".join(f"z_{level}" for level in frozen) + "\nfrozen" if frozen else "all drawn\nanew"
