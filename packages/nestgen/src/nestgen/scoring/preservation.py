"""What samples keep of the real pictures whose levels they are frozen to: class, look and colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nestgen import randomness as noise
from nestgen.errors import UserError
from nestgen.files import read_json
from nestgen.images import read_images
from nestgen.recipe.recipe import Recipe
from nestgen.sampling.card import check_drawn_alike
from nestgen.sampling.decoder import load_decoder
from nestgen.sampling.real import open_real, real_latents, training_root
from nestgen.scoring.spaces import features, open_encoded
from nestgen.stores.store import open_store

NEIGHBOURS = 20  # that vote on a sample's class
SHOWN = 500  # samples whose colours are compared
GRID = 4  # mean colours of so many places down and across


def kept(
    recipe: Recipe, card: dict[str, Any], samples: Path, samples_store: Path, level_name: str, vae: Path | None = None
) -> dict[str, Any]:
    """Shares of samples that keep something of the row they are like; empty for samples that are like none.

    class     of the source, by the vote of the 20 nearest training rows in the encoder's space; None without labels
    features  nearer to the source than to another row, in the encoder's space
    colours   the same by the mean colours of 4 x 4 places
    chance    the three shares, were each of these samples like another's source
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
    of_class, by_chance = _class(recipe, root, samples_store, level_name, drawn_ND, sources)
    found: dict[str, Any] = {
        "class": of_class,
        "features": _nearer(drawn_ND, features(real, sources), features(real, others)),
    }
    z_0 = open_real(recipe, 0, root)
    decode, shown = load_decoder(z_0.attributes["codec"], vae), min(count, SHOWN)
    theirs, strange = (
        _colours(decode(real_latents(z_0, rows[:shown].tolist(), recipe.seed))) for rows in (sources, others)
    )
    found["colours"] = _nearer(_colours(read_images(samples, shown)), theirs, strange)
    frozen = [number for number, level in enumerate(card["levels"]) if "frozen" in level]
    chance = {"class": by_chance, "features": 0.5, "colours": 0.5}
    return {"frozen_from": min(frozen), **found, "chance": chance, "samples": count}


def kept_by_level(cards: Sequence[Path], drawn: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """What score cards say samples keep, by the lowest level that was frozen.

    `drawn` is the card of a run that they stand beside: raises UserError for samples of other denoisers or settings, and
    for scores that say nothing of it.
    """
    found: dict[int, dict[str, Any]] = {}
    for path in cards:
        card = read_json(path)
        if "kept" not in card:
            raise UserError(
                f"{path} does not say what its samples keep; draw them with --like each, and score them with --samples-store"
            )
        lowest = card["kept"]["frozen_from"]
        check_drawn_alike(path, card["samples"]["levels"][:lowest], drawn["levels"][:lowest])
        found[lowest] = card["kept"]
    return found


def _nearer(x_ND: np.ndarray, own_ND: np.ndarray, other_ND: np.ndarray) -> float:
    nearer = np.linalg.norm(x_ND - own_ND, axis=1) < np.linalg.norm(x_ND - other_ND, axis=1)
    return float(nearer.mean())


def _class(
    recipe: Recipe, root: Path, samples_store: Path, level_name: str, drawn_ND: np.ndarray, sources: np.ndarray
) -> tuple[float | None, float | None]:
    """Share of samples whose neighbours' most frequent class is the source's, of sources with a class; and by chance."""
    training = training_root(recipe)
    _, trained_on, _ = open_encoded(recipe, training, samples_store, level_name)
    labels = open_store(training / "labels.zarr").load()
    own = open_store(root / "labels.zarr").load()[sources]
    known = np.flatnonzero(labels >= 0)
    if not len(known) or not (own >= 0).any():
        return None, None
    rows_MD = torch.from_numpy(features(trained_on, known))
    votes = []
    for part_BD in torch.from_numpy(drawn_ND).split(1024):
        nearest_BK = torch.cdist(part_BD, rows_MD).topk(min(NEIGHBOURS, len(known)), largest=False).indices
        votes += [np.bincount(classes).argmax() for classes in labels[known][nearest_BK.numpy()]]
    vote, own = np.array(votes)[own >= 0], own[own >= 0]
    by_chance = (vote[:, None] == np.unique(own)).mean(0) @ (own[:, None] == np.unique(own)).mean(0)
    return float((vote == own).mean()), float(by_chance)


def _colours(pictures_NHWC: np.ndarray) -> np.ndarray:
    """Mean colours (N, 48) of 4 x 4 places."""
    x_NCHW = torch.from_numpy(pictures_NHWC).permute(0, 3, 1, 2).double()
    return torch.nn.functional.adaptive_avg_pool2d(x_NCHW, GRID).flatten(1).numpy()
