"""Memorisation: the training rows nearest to samples at each level, and whether samples lie nearer than real images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from upath import UPath

from nestgen.files import write_json
from nestgen.images import draw_sheet, read_images, write_image
from nestgen.recipe.locations import store_root
from nestgen.recipe.recipe import Recipe
from nestgen.sampling.card import read_card
from nestgen.sampling.decoder import load_decoder
from nestgen.sampling.descent import default_device
from nestgen.sampling.latents import open_latents
from nestgen.sampling.real import open_real, real_latents, reference_root
from nestgen.stores.store import Store

BLOCK = 4096  # training rows compared at a time
FLOOR = 1000  # held-out rows that say how near to the training rows a new image lies


def nearest_rows(queries_NCHW: Tensor, store: Store, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Distances and rows (N, count) of the nearest rows of a level to latents, by Euclidean distance, exactly."""
    queries_ND = queries_NCHW.flatten(1).to(default_device(), torch.float64)
    best = torch.full((len(queries_ND), count), torch.inf, dtype=torch.float64, device=queries_ND.device)
    rows = torch.full(best.shape, -1, device=queries_ND.device)
    for first in range(0, store.rows, BLOCK):
        block = range(first, min(first + BLOCK, store.rows))
        values_BD = real_latents(store, block, seed).flatten(1).to(queries_ND)
        together = torch.cat([best, torch.cdist(queries_ND, values_BD)], 1)
        numbers = torch.arange(block.start, block.stop, device=rows.device).expand(len(queries_ND), -1)
        best, index = together.topk(count, dim=1, largest=False)
        rows = torch.cat([rows, numbers], 1).gather(1, index)
    return best.cpu(), rows.cpu()


def memorisation(
    recipe: Recipe, samples: Path, out: Path, count: int, reference: Path | UPath | None = None, vae: Path | None = None
) -> None:
    """Writes the sheet of `count` samples with their nearest training row at each level, and the numbers as .json.

    Each level's number is the share of samples that lie nearer to a training row than 99 % of the held-out images do:
    0.01 for a model that has memorised no row. It needs held-out rows as the reference; without them it is null.
    """
    card = read_card(recipe, samples)
    recipe = recipe.depth(card["depth"])
    training, held_out = store_root(recipe), reference_root(recipe, reference)
    shown = min(count, card["count"])
    images, titles = [read_images(samples, shown)], ["samples"]
    levels: list[dict[str, Any]] = []
    z_0 = open_real(recipe, 0, training, card["levels"][0]["store_fingerprint"])
    decode = load_decoder(z_0.attributes["codec"], vae, str(default_device()))
    for level in reversed(range(card["depth"])):
        fingerprint = card["levels"][level]["store_fingerprint"]
        store = open_real(recipe, level, training, fingerprint)
        held_out_store = None
        if held_out.resolve() != training.resolve():
            held_out_store = open_real(recipe, level, held_out, fingerprint)
        z_NCHW = torch.from_numpy(open_latents(samples, level).read_all()).permute(0, 3, 1, 2)
        levels.append({"level": level, **_distances(z_NCHW, store, held_out_store, shown, recipe.seed)})
        images.append(decode(real_latents(z_0, levels[-1]["rows"], recipe.seed)))
        titles.append(f"nearest\nby z_{level}")
    write_image(draw_sheet(images, titles), out)
    write_json(out.with_suffix(".json"), {"samples": card, "training": str(z_0.path.parent.parent), "levels": levels})
    for entry in levels:
        print(_line(entry))


def _distances(z_NCHW: Tensor, store: Store, held_out: Store | None, shown: int, seed: int) -> dict[str, Any]:
    """A level's entry in the .json: how near samples lie to training rows, beside held-out rows if there are any."""
    distance_N1, row_N1 = nearest_rows(z_NCHW, store, 1, seed)
    entry: dict[str, Any] = {"rows": row_N1[:shown, 0].tolist(), "median_distance": float(distance_N1.median())}
    if held_out is None:
        return entry | {"held_out_median_distance": None, "nearer_than_held_out": None}
    some = np.linspace(0, held_out.rows - 1, min(held_out.rows, FLOOR)).astype(int).tolist()
    floor_M1, _ = nearest_rows(real_latents(held_out, some, seed), store, 1, seed)
    entry["held_out_median_distance"] = float(floor_M1.median())
    entry["nearer_than_held_out"] = float((distance_N1 < floor_M1.quantile(0.01)).double().mean())
    return entry


def _line(entry: dict[str, Any]) -> str:
    line = f"z_{entry['level']}: median distance to the nearest training row {entry['median_distance']:.3g}"
    if entry["nearer_than_held_out"] is None:
        return line
    return (
        f"{line}, of held-out images {entry['held_out_median_distance']:.3g}; "
        f"{100 * entry['nearer_than_held_out']:.1f} % of samples nearer than 99 % of those"
    )
