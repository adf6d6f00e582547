"""Memorisation: the training rows nearest to samples at each level, and whether samples lie nearer than real pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestgen.files import write_json
from nestgen.images import draw_sheet, read_images, write_image
from nestgen.recipe.recipe import Recipe
from nestgen.sampling.decoder import load_decoder
from nestgen.sampling.descent import device
from nestgen.sampling.latents import open_latents
from nestgen.sampling.real import open_real, real_latents, training_root
from nestgen.scoring.evaluate import reference_root, sample_card
from nestgen.stores.store import Store

BLOCK = 4096  # training rows compared at a time
FLOOR = 1000  # held-out rows that say how near to the training rows a new picture lies


def nearest_rows(queries_NCHW: Tensor, store: Store, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Distances and rows (N, count) of the nearest rows of a level to latents, by Euclidean distance, exactly."""
    queries_ND = queries_NCHW.flatten(1).to(device(), torch.float64)
    best = torch.full((len(queries_ND), count), torch.inf, dtype=torch.float64, device=queries_ND.device)
    rows = torch.full(best.shape, -1, device=queries_ND.device)
    for first in range(0, store.rows, BLOCK):
        block = range(first, min(first + BLOCK, store.rows))
        values_BD = real_latents(store, block, seed).flatten(1).to(queries_ND)
        together = torch.cat([best, torch.cdist(queries_ND, values_BD)], 1)
        numbers = torch.arange(block.start, block.stop, device=rows.device).expand(len(queries_ND), -1)
        best, place = together.topk(count, dim=1, largest=False)
        rows = torch.cat([rows, numbers], 1).gather(1, place)
    return best.cpu(), rows.cpu()


def nearest(
    recipe: Recipe, samples: Path, out: Path, count: int, reference: Path | None = None, vae: Path | None = None
) -> None:
    """Writes the sheet of `count` samples with their nearest training row at each level, and the numbers as .json.

    Each level's number is the share of samples that lie nearer to a training row than 99 % of the held-out pictures
    do: 0.01 for a model that has learned no row by heart. It needs a reference of its own; without one it is null.
    """
    card = sample_card(recipe, samples)
    recipe = recipe.depth(card["depth"])
    training, held_out = training_root(recipe), reference_root(recipe, reference)
    shown = min(count, card["count"])
    pictures, titles = [read_images(samples, shown)], ["samples"]
    levels: list[dict[str, Any]] = []
    z_0 = open_real(recipe, 0, training, card["levels"][0]["store_fingerprint"])
    decode = load_decoder(z_0.attributes["codec"], vae, str(device()))
    for level in reversed(range(card["depth"])):
        fingerprint = card["levels"][level]["store_fingerprint"]
        store = open_real(recipe, level, training, fingerprint)
        drawn_NCHW = torch.from_numpy(open_latents(samples, level).read_all()).permute(0, 3, 1, 2)
        distance_N1, row_N1 = nearest_rows(drawn_NCHW, store, 1, recipe.seed)
        found: dict[str, Any] = {"level": level, "rows": row_N1[:shown, 0].tolist()}
        found["median_distance"] = float(distance_N1.median())
        found |= {"held_out_median_distance": None, "nearer_than_held_out": None}
        if held_out.resolve() != training.resolve():
            real = open_real(recipe, level, held_out, fingerprint)
            some = np.linspace(0, real.rows - 1, min(real.rows, FLOOR)).astype(int).tolist()
            theirs = nearest_rows(real_latents(real, some, recipe.seed), store, 1, recipe.seed)[0]
            found["held_out_median_distance"] = float(theirs.median())
            found["nearer_than_held_out"] = float((distance_N1 < theirs.quantile(0.01)).double().mean())
        levels.append(found)
        pictures.append(decode(real_latents(z_0, found["rows"], recipe.seed)))
        titles.append(f"nearest\nby z_{level}")
    write_image(draw_sheet(pictures, titles), out)
    write_json(out.with_suffix(".json"), {"samples": card, "training": str(z_0.path.parent.parent), "levels": levels})
    for found in levels:
        print(_line(found))


def _line(found: dict[str, Any]) -> str:
    line = f"z_{found['level']}: median distance to the nearest training row {found['median_distance']:.3g}"
    if found["nearer_than_held_out"] is None:
        return line
    return (
        f"{line}, of held-out pictures {found['held_out_median_distance']:.3g}; "
        f"{100 * found['nearer_than_held_out']:.1f} % of samples nearer than 99 % of those"
    )
