"""What samples keep of the real pictures whose levels they are frozen to: class, look and colours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from nestgen import noise
from nestgen.decode import load_decoder
from nestgen.recipe import Recipe
from nestgen.sheet import read_pictures
from nestgen.sources import open_real, real_latents, training_root
from nestgen.spaces import features, open_encoded
from nestgen.store import open_store

NEIGHBOURS = 20  # that vote on a sample's class
SHOWN = 500  # samples whose colours are compared
GRID = 4  # mean colours of so many places down and across


def kept(recipe: Recipe, card: dict[str, Any], samples: Path, samples_store: Path, level_name: str) -> dict[str, Any]:
    """Shares of samples that keep something of the row they are like; empty for samples that are like none.

    class     of the source, by the vote of the 20 nearest training rows in the encoder's space; None without labels
    features  nearer to the source than to another row, in the encoder's space: 0.5 by chance
    colours   the same by the mean colours of 4 x 4 places: 0.5 by chance
    """
    top = card["levels"][-1].get("frozen", {})
    if "store" not in top:
        return {}
    root, count = Path(top["store"]).parent.parent, card["count"]
    sources = np.arange(count) if top["row"] == "each" else np.full(count, top["row"])
    encoded, real, _ = open_encoded(recipe, root, samples_store, level_name)
    others = noise.generator(recipe.seed, "kept/others", 0).integers(1, real.rows, count)
    others = (sources + others) % real.rows  # any row but the source
    drawn_ND = features(encoded, np.arange(count))
    found = {
        "class": _class(recipe, root, samples_store, level_name, drawn_ND, sources),
        "features": _nearer(drawn_ND, features(real, sources), features(real, others)),
    }
    z_0 = open_real(recipe, 0, root)
    decode, shown = load_decoder(z_0.attributes["codec"]), min(count, SHOWN)
    theirs, strange = (
        _colours(decode(real_latents(z_0, rows[:shown].tolist(), recipe.seed))) for rows in (sources, others)
    )
    found["colours"] = _nearer(_colours(read_pictures(samples, shown)), theirs, strange)
    frozen = [number for number, level in enumerate(card["levels"]) if "frozen" in level]
    return {"frozen_from": min(frozen), **found}


def _nearer(x_ND: np.ndarray, own_ND: np.ndarray, other_ND: np.ndarray) -> float:
    nearer = np.linalg.norm(x_ND - own_ND, axis=1) < np.linalg.norm(x_ND - other_ND, axis=1)
    return float(nearer.mean())


def _class(
    recipe: Recipe, root: Path, samples_store: Path, level_name: str, drawn_ND: np.ndarray, sources: np.ndarray
) -> float | None:
    """Share of samples whose neighbours' most frequent class is the source's, of sources with a class."""
    training = training_root(recipe)
    _, trained_on, _ = open_encoded(recipe, training, samples_store, level_name)
    labels = open_store(training / "labels.zarr").load()
    own = open_store(root / "labels.zarr").load()[sources]
    known = np.flatnonzero(labels >= 0)
    if not len(known) or not (own >= 0).any():
        return None
    rows_MD = torch.from_numpy(features(trained_on, known))
    votes = []
    for part_BD in torch.from_numpy(drawn_ND).split(1024):
        nearest_BK = torch.cdist(part_BD, rows_MD).topk(min(NEIGHBOURS, len(known)), largest=False).indices
        votes += [np.bincount(classes).argmax() for classes in labels[known][nearest_BK.numpy()]]
    return float((np.array(votes) == own)[own >= 0].mean())


def _colours(pictures_NHWC: np.ndarray) -> np.ndarray:
    """Mean colours (N, 48) of 4 x 4 places."""
    x_NCHW = torch.from_numpy(pictures_NHWC).permute(0, 3, 1, 2).double()
    return torch.nn.functional.adaptive_avg_pool2d(x_NCHW, GRID).flatten(1).numpy()
