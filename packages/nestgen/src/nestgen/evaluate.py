"""Scores of a sample folder: Fréchet distances per level and in the frozen encoder's space. None is an FID."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from nestgen import noise
from nestgen.errors import UserError
from nestgen.files import read_json, write_json
from nestgen.frechet import frechet_distance
from nestgen.latents import open_latents
from nestgen.recipe import Level, Recipe, shape_name, store_path
from nestgen.sources import check_comparable, open_real, real_latents, seal_of, training_root
from nestgen.store import Store, open_store

DIMENSIONS = 1024  # at most; larger latents are average-pooled
BLOCK = 1024  # rows turned into vectors at a time


@dataclass(frozen=True)
class Space:
    """A space in which samples are compared with real pictures.

    `reference` holds the real ones. `training`, where it is another store, holds those that the denoisers saw:
    its distance to the reference is the floor. `vectors` turns rows of such a store into (N, D).
    """

    name: str
    reference: Store
    training: Store | None
    vectors: Callable[[Store, np.ndarray], np.ndarray]


def evaluate(
    recipe: Recipe,
    samples: Path,
    reference: Path | None,
    samples_store: Path | None,
    encoder_level: str,
    out: Path,
) -> None:
    """Scores a sample folder: writes every score to `out`, a JSON card, and prints a line for each.

    `reference` is the store root to score against (None: the recipe's evaluation.reference, else the training
    rows), `samples_store` the root into which the pictures were encoded (None: no score in the encoder's space)
    and `encoder_level` the level that is compared there, such as 1x1x64.
    """
    card = _sample_card(recipe, samples)
    recipe = recipe.depth(card["depth"])
    training = training_root(recipe)
    if reference is None:
        named = recipe.evaluation.reference
        reference = training if named is None else recipe.root / named
    scores = []
    for level in reversed(range(card["depth"])):
        space = _level_space(recipe, level, reference, training, card)
        scores.append(_score(recipe, space, pool(open_latents(samples, level).read_all())))
    if samples_store is not None:
        space, encoded = _encoder_space(recipe, reference, training, samples_store, encoder_level)
        if encoded.rows != card["count"]:
            raise UserError(
                f"{encoded.path} has {encoded.rows} rows for {card['count']} samples; "
                f"extract folder:{samples} again into an empty root"
            )
        scores.append(_score(recipe, space, features(encoded, np.arange(encoded.rows))))
    versions = {name: importlib.metadata.version(name) for name in ("nestgen", "numpy", "torch")}
    write_json(out, {"scores": scores, "samples": card, "versions": versions})
    for score in scores:
        print(_line(score))


def _sample_card(recipe: Recipe, samples: Path) -> dict[str, Any]:
    """sample.json of a folder, or UserError where there is none or it is of another recipe."""
    if not (samples / "sample.json").is_file():
        raise UserError(f"{samples} has no sample.json; draw samples there with `nestgen sample`")
    card = read_json(samples / "sample.json")
    theirs = [level["shape"] for level in card["levels"]]
    ours = [shape_name(level.shape) for level in recipe.levels][: len(theirs)]
    if card["recipe"] != recipe.name or theirs != ours:
        raise UserError(
            f"{samples} was drawn from {card['recipe']} with levels {', '.join(theirs)}, but {recipe.file} is "
            f"{recipe.name} with {', '.join(ours)}; name the right recipe with --recipe"
        )
    return card


def _level_space(recipe: Recipe, level: int, reference: Path, training: Path, card: dict[str, Any]) -> Space:
    """The latents of a level, as its denoiser sees them."""
    fingerprint = card["levels"][level]["store_fingerprint"]

    def vectors(store: Store, rows: np.ndarray) -> np.ndarray:
        return pool(real_latents(store, rows.tolist(), recipe.seed).permute(0, 2, 3, 1).numpy())

    trained_on = open_real(recipe, level, training, fingerprint)
    if reference.resolve() == training.resolve():
        return Space(f"z_{level}", trained_on, None, vectors)
    return Space(f"z_{level}", open_real(recipe, level, reference, fingerprint), trained_on, vectors)


def _encoder_space(
    recipe: Recipe, reference: Path, training: Path, samples_store: Path, name: str
) -> tuple[Space, Store]:
    """The frozen encoder's features, and the store of the encoded samples."""
    try:
        level = Level.model_validate({"shape": name, "patch": 1})
    except ValidationError:
        raise UserError(f"{name} is no level; --level-shape is height x width x channels, such as 1x1x64") from None
    with_level = recipe.model_copy(update={"levels": (recipe.levels[0], level)})

    def path(root: Path) -> Path:
        return store_path(with_level, 1, root)

    encoded, real = open_store(path(samples_store)), open_store(path(reference))
    check_comparable(encoded, real)
    trained_on = None
    if reference.resolve() != training.resolve() and path(training).is_dir():
        trained_on = open_store(path(training))
        check_comparable(trained_on, real)
    return Space(f"{recipe.features.encoder} {name}", real, trained_on, features), encoded


def features(store: Store, rows: np.ndarray) -> np.ndarray:
    """Features (N, D) of a level's rows as they were before standardisation."""
    stored = store.read(rows, np.zeros_like(rows)).astype(np.float64)
    return pool(stored * np.array(store.attributes["std"]) + np.array(store.attributes["mean"]))


def pool(z_NHWC: np.ndarray) -> np.ndarray:
    """Vectors (N, D): latents averaged over the smallest square windows that bring D to DIMENSIONS or less."""
    _, h, w, c = z_NHWC.shape
    sides = [side for side in range(1, gcd(h, w) + 1) if gcd(h, w) % side == 0]
    side = next((side for side in sides if h * w * c <= DIMENSIONS * side**2), sides[-1])
    z_NCHW = torch.from_numpy(z_NHWC).permute(0, 3, 1, 2)
    return F.avg_pool2d(z_NCHW, side).flatten(1).numpy()


def _score(recipe: Recipe, space: Space, samples_ND: np.ndarray) -> dict[str, Any]:
    """The distance of samples to the reference, the floor, and what they were computed on."""

    def rows_of(store: Store, rows: np.ndarray) -> np.ndarray:
        blocks = [rows[first : first + BLOCK] for first in range(0, len(rows), BLOCK)]
        return np.concatenate([space.vectors(store, block) for block in blocks])

    def against_reference(what: str, vectors_ND: np.ndarray) -> float:
        try:
            return frechet_distance(vectors_ND, reference_MD)
        except ValueError as error:
            raise UserError(f"{what} cannot be scored in {space.name}: {error}") from None

    reference_MD = rows_of(space.reference, np.arange(space.reference.rows))
    score = {
        "space": space.name,
        "frechet_distance": against_reference(f"the {len(samples_ND)} samples", samples_ND),
        "samples": len(samples_ND),
        "dimensions": samples_ND.shape[1],
        "pooled_from": shape_name(space.reference.latent_shape),
        "reference": _origin(space.reference, len(reference_MD)),
    }
    if space.training is not None:  # as many training rows as samples, so that both carry the same bias
        order = noise.generator(recipe.seed, "evaluate/floor", 0).permutation(space.training.rows)
        floor_ND = rows_of(space.training, order[: len(samples_ND)])
        score["floor"] = {
            "frechet_distance": against_reference("the training rows", floor_ND),
            **_origin(space.training, len(floor_ND)),
        }
    return score


def _origin(store: Store, rows: int) -> dict[str, Any]:
    return {"store": str(store.path), "rows": rows, "sha256": seal_of(store)["sha256"]}


def _line(score: dict[str, Any]) -> str:
    floor = f", real to real {score['floor']['frechet_distance']:.4g}" if "floor" in score else ""
    return (
        f"{score['space']:<12} Fréchet distance {score['frechet_distance']:<9.4g} {score['samples']} samples against "
        f"{score['reference']['rows']} rows of {score['reference']['store']}, {score['dimensions']} dimensions{floor}"
    )
