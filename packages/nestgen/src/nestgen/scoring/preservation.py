"""What samples preserve of the real images that their levels are frozen to: class, features and colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from upath import UPath

from nestgen import randomness
from nestgen.errors import UserError
from nestgen.files import read_json
from nestgen.images import read_images
from nestgen.recipe.locations import resolve_path, store_root
from nestgen.recipe.recipe import Recipe
from nestgen.sampling.card import check_same_settings
from nestgen.sampling.decoder import load_decoder
from nestgen.sampling.real import open_real, real_latents
from nestgen.scoring.spaces import EncodedSamples, features, open_encoded
from nestgen.stores.store import open_store

ASPECTS = ("class", "features", "colours")
NEIGHBOURS = 20  # that vote on a sample's class
SHOWN = 500  # samples whose colours are compared
GRID = 4  # mean colours of so many places down and across


def preservation(
    recipe: Recipe, card: dict[str, Any], samples: Path, encoded: EncodedSamples, vae: Path | None = None
) -> dict[str, Any]:
    """Shares of samples that preserve something of the row they are frozen to; empty for samples frozen to none.

    class     of the row, by the vote of the 20 nearest training rows in the encoder's space; None without labels
    features  nearer to the row than to another one, in the encoder's space; None where there is no other
    colours   the same by the mean colours of 4 x 4 places
    chance    the three shares, if the samples were frozen to each other's rows
    """
    top = card["levels"][-1].get("frozen", {})
    if "store" not in top:
        return {}
    root, count = resolve_path(Path(), top["store"]).parent.parent, card["count"]
    rows = np.arange(count) if top["row"] == "each" else np.full(count, top["row"])
    store, real, _ = open_encoded(recipe, encoded, root)
    samples_ND = features(store, np.arange(count))
    of_class, class_by_chance = _class(recipe, root, encoded, samples_ND, rows)
    frozen = [number for number, level in enumerate(card["levels"]) if "frozen" in level]
    nearer, colours_nearer, by_chance = None, None, None
    if real.rows > 1:  # else there is no other row
        shifts = randomness.generator(recipe.seed, "kept/others", 0).integers(1, real.rows, count)
        others = (rows + shifts) % real.rows  # any row but the own
        nearer, by_chance = _nearer(samples_ND, features(real, rows), features(real, others)), 0.5
        colours_nearer = _colours_share(recipe, samples, root, rows[:SHOWN], others[:SHOWN], vae)
    return {
        "frozen_from": min(frozen),
        "class": of_class,
        "features": nearer,
        "colours": colours_nearer,
        "chance": {"class": class_by_chance, "features": by_chance, "colours": by_chance},
        "samples": count,
    }


def preservation_by_level(
    card_files: Sequence[Path], level_cards: Sequence[Mapping[str, Any]]
) -> dict[int, dict[str, Any]]:
    """What score cards say that samples preserve, by the lowest level that was frozen.

    `level_cards` are of the run that they stand beside, z_0's first. Raises UserError for samples of other denoisers or
    settings, and for scores without preservation.
    """
    by_level: dict[int, dict[str, Any]] = {}
    for file in card_files:
        card = read_json(file)
        if "kept" not in card:
            raise UserError(
                f"{file} does not say what its samples preserve; sample with --like each, and score with --samples-store"
            )
        lowest = card["kept"]["frozen_from"]
        check_same_settings(file, card["samples"]["levels"][:lowest], level_cards[:lowest])
        by_level[lowest] = card["kept"]
    return by_level


def _nearer(x_ND: np.ndarray, own_ND: np.ndarray, other_ND: np.ndarray) -> float:
    nearer = np.linalg.norm(x_ND - own_ND, axis=1) < np.linalg.norm(x_ND - other_ND, axis=1)
    return float(nearer.mean())


def _class(
    recipe: Recipe, root: Path | UPath, encoded: EncodedSamples, samples_ND: np.ndarray, rows: np.ndarray
) -> tuple[float | None, float | None]:
    """Share of samples whose neighbours' most frequent class is that of their row, of rows with a class; and by chance."""
    training = store_root(recipe)
    _, training_store, _ = open_encoded(recipe, encoded, training)
    labels = open_store(training / "labels.zarr").load()
    own = open_store(root / "labels.zarr").load()[rows]
    labelled = np.flatnonzero(labels >= 0)
    if not len(labelled) or not (own >= 0).any():
        return None, None
    training_MD = torch.from_numpy(features(training_store, labelled))
    votes = []
    for part_BD in torch.from_numpy(samples_ND).split(1024):
        nearest_BK = torch.cdist(part_BD, training_MD).topk(min(NEIGHBOURS, len(labelled)), largest=False).indices
        votes += [np.bincount(classes).argmax() for classes in labels[labelled][nearest_BK.numpy()]]
    vote, own = np.array(votes)[own >= 0], own[own >= 0]
    by_chance = (vote[:, None] == np.unique(own)).mean(0) @ (own[:, None] == np.unique(own)).mean(0)
    return float((vote == own).mean()), float(by_chance)


def _colours_share(
    recipe: Recipe, samples: Path, root: Path | UPath, rows: np.ndarray, others: np.ndarray, vae: Path | None
) -> float:
    """Share of the first len(rows) samples whose colours are nearer to those of their row than of another one."""
    z_0 = open_real(recipe, 0, root)
    decode = load_decoder(z_0.attributes["codec"], vae)
    own, other = (_colours(decode(real_latents(z_0, some.tolist(), recipe.seed))) for some in (rows, others))
    return _nearer(_colours(read_images(samples, len(rows))), own, other)


def _colours(images_NHWC: np.ndarray) -> np.ndarray:
    """Mean colours (N, 48) of 4 x 4 places."""
    x_NCHW = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).double()
    return torch.nn.functional.adaptive_avg_pool2d(x_NCHW, GRID).flatten(1).numpy()
