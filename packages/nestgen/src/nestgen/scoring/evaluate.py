"""Scores of a sample folder, each with all it was computed on. Only Inception's Fréchet distance is an FID."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from upath import UPath

from nestgen.errors import UserError
from nestgen.files import write_json
from nestgen.recipe.locations import expand_home, store_root
from nestgen.recipe.protocols import PROTOCOLS
from nestgen.recipe.recipe import Recipe
from nestgen.recipe.sections import parse_shape
from nestgen.sampling.card import read_card
from nestgen.sampling.real import reference_root
from nestgen.scoring.inception import find_weights
from nestgen.scoring.preservation import ASPECTS, preservation
from nestgen.scoring.spaces import EncodedSamples, Space, encoder_space, inception_space, level_space
from nestgen.scoring.statistics import Statistics, measure


@dataclass(frozen=True)
class References:
    """What samples are compared with.

    reference      store root of real images; None is the recipe's evaluation.reference, else the training rows
    samples_store  root into which the sample images were encoded; None is no score in the encoder's space
    encoder_level  level of that root that is compared, such as 1x1x64
    encoder        the encoder that made it; None is the recipe's
    pictures       folder of real images, or .npz of mu and sigma, for an FID; None is the recipe's
    inception      Inception's weights; None is torch's cache, if they are there
    vae            the VAE's weights, which show the rows that levels are frozen to; None is where z_0's store says
    """

    reference: Path | UPath | None = None
    samples_store: Path | UPath | None = None
    encoder_level: str = "1x1x64"
    encoder: str | None = None
    pictures: Path | None = None
    inception: Path | None = None
    vae: Path | None = None


def evaluate(recipe: Recipe, samples: Path, references: References, out: Path) -> None:
    """Scores a sample folder: writes every score to `out`, a JSON card, and prints a line for each."""
    card = read_card(recipe, samples)
    recipe = recipe.depth(card["depth"])
    reference = reference_root(recipe, references.reference)
    protocol = _protocol(recipe, samples, card, reference)
    encoded = _encoded_samples(recipe, references)
    scores = [_score(level_space(recipe, level, reference, card, samples)) for level in reversed(range(card["depth"]))]
    if encoded is not None:
        scores.append(_score(encoder_space(recipe, encoded, reference, card, samples)))
    if space := _inception(recipe, references, samples):
        scores.append(_score(space) | {"name": "FID"})
    preserved = {} if encoded is None else preservation(recipe, card, samples, encoded, references.vae)
    packages = ("nestgen", "numpy", "torch", *(["torch-fidelity"] if scores[-1].get("name") else []))
    write_json(
        out,
        {
            "scores": scores,
            **({"kept": preserved} if preserved else {}),
            "protocol": protocol,
            "samples": card,
            "versions": {name: importlib.metadata.version(name) for name in packages},
        },
    )
    for score in scores:
        print(_line(score))
    shares = [f"{key} {100 * preserved[key]:.0f} %" for key in ASPECTS if preserved.get(key) is not None]
    if shares:
        print(f"preserved of the rows, levels frozen from z_{preserved['frozen_from']}: {', '.join(shares)}")


def _protocol(recipe: Recipe, samples: Path, card: dict[str, Any], reference: Path | UPath) -> str | None:
    """The recipe's protocol, none for samples with frozen levels. Raises UserError for samples that do not follow it."""
    name = recipe.evaluation.protocol
    if name is None or "frozen" in card["levels"][-1]:
        return None
    held_out = reference.resolve() != store_root(recipe).resolve()
    if violation := PROTOCOLS[name].violation(card, held_out):
        raise UserError(f"{samples} does not follow evaluation.protocol {name}: {violation}")
    return name


def _encoded_samples(recipe: Recipe, references: References) -> EncodedSamples | None:
    if references.samples_store is None:
        return None
    try:
        shape = parse_shape(references.encoder_level)
    except ValueError:
        raise UserError(
            f"{references.encoder_level} is not a level; give --level-shape as height x width x channels, such as 1x1x64"
        ) from None
    assert isinstance(shape, tuple)
    return EncodedSamples(references.samples_store, references.encoder or recipe.features.encoder, shape)


def _inception(recipe: Recipe, references: References, samples: Path) -> Space | None:
    default = recipe.evaluation.pictures
    pictures = references.pictures or (None if default is None else recipe.root / expand_home(default))
    if pictures is None:
        if references.inception is not None:
            raise UserError("an FID needs real pictures: give a folder, or an .npz of mu and sigma, with --pictures")
        return None
    try:
        return inception_space(recipe, pictures, find_weights(references.inception), samples)
    except UserError as error:
        if references.pictures is not None or references.inception is not None:
            raise
        print(f"no FID: {error}")  # the recipe asks for it, and the other scores can be had
        return None


def _score(space: Space) -> dict[str, Any]:
    """The scores of samples against the reference, the floor, and what they were computed on."""

    def scores_of(what: str, vectors_ND: np.ndarray, reference: Statistics) -> dict[str, Any]:
        try:
            return measure(vectors_ND, reference)
        except ValueError as error:
            raise UserError(f"{what} cannot be scored in {space.name}: {error}") from None

    count = len(space.samples_ND)
    try:
        reference = space.reference()
    except ValueError as error:
        raise UserError(f"the reference cannot be scored in {space.name}: {error}") from None
    score = {"space": space.name, **scores_of(f"the {count} samples", space.samples_ND, reference)}
    score |= {"samples": count, **space.about, "reference": space.origin}
    if space.floor is not None:  # as many training rows as samples, so that both carry the same bias
        floor_ND = space.floor(count)
        score["floor"] = scores_of("the training rows", floor_ND, reference) | {
            **space.floor_origin,
            "rows": len(floor_ND),
        }
    return score


def _line(score: dict[str, Any]) -> str:
    name = score.get("name", "Fréchet distance")
    where = score["reference"].get("store") or score["reference"]["pictures"]
    rows = score["reference"]["rows"]
    parts = [f"{name} {score['frechet_distance']:.4g}"]
    if score.get("kid") is not None:
        parts.append(f"KID {score['kid']:.3g} ± {score['kid_error']:.1g}")
    if score.get("precision") is not None:
        parts += [f"{key} {score[key]:.2f}" for key in ("precision", "recall", "density", "coverage")]
    if "floor" in score:
        parts.append(f"real to real {score['floor']['frechet_distance']:.4g}")
    against = f"{rows} rows of {where}" if rows is not None else str(where)
    on = f"{score['samples']} samples against {against}, {score['dimensions']} dimensions"
    if "inception" in score:
        on += f", Inception as in {score['inception']}"
    return f"{score['space']:<12} {', '.join(parts)}; {on}"
