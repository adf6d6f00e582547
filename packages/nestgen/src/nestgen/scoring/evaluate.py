"""Scores of a sample folder, each with all it was computed on. Only Inception's Fréchet distance is an FID."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestgen.errors import UserError
from nestgen.files import read_json, write_json
from nestgen.recipe.protocols import PROTOCOLS
from nestgen.recipe.recipe import Recipe
from nestgen.recipe.sections import shape_name
from nestgen.sampling.real import training_root
from nestgen.scoring.inception import find_weights
from nestgen.scoring.preservation import kept
from nestgen.scoring.spaces import Space, encoder_space, inception_space, level_space
from nestgen.scoring.statistics import Statistics, measure


@dataclass(frozen=True)
class Against:
    """What samples are compared with.

    reference      store root of real pictures; None is the recipe's evaluation.reference, else the training rows
    samples_store  root into which the sample pictures were encoded; None is no score in the encoder's space
    encoder_level  level of that root that is compared, such as 1x1x64
    encoder        the encoder that made it; None is the recipe's
    pictures       folder of real pictures, or .npz of mu and sigma, for an FID; None is the recipe's
    inception      Inception's weights; None is torch's cache, if they are there
    vae            the VAE's weights, which show the rows that samples are like; None is where z_0's store says
    """

    reference: Path | None = None
    samples_store: Path | None = None
    encoder_level: str = "1x1x64"
    encoder: str | None = None
    pictures: Path | None = None
    inception: Path | None = None
    vae: Path | None = None


def evaluate(recipe: Recipe, samples: Path, against: Against, out: Path) -> None:
    """Scores a sample folder: writes every score to `out`, a JSON card, and prints a line for each."""
    card = sample_card(recipe, samples)
    recipe = recipe.depth(card["depth"])
    reference = reference_root(recipe, against.reference)
    protocol = None if "frozen" in card["levels"][-1] else recipe.evaluation.protocol  # variations follow none
    if name := protocol:
        held_out = reference.resolve() != training_root(recipe).resolve()
        if fault := PROTOCOLS[name].fault(card, held_out):
            raise UserError(f"{samples} does not follow evaluation.protocol {name}: {fault}")
    encoder = recipe.features.model_copy(update={"encoder": against.encoder or recipe.features.encoder})
    seen = recipe.model_copy(update={"features": encoder})
    scores = []
    for level in reversed(range(card["depth"])):
        scores.append(_score(level_space(recipe, level, reference, card, samples)))
    if against.samples_store is not None:
        scores.append(
            _score(encoder_space(seen, reference, against.samples_store, against.encoder_level, card, samples))
        )
    if space := _inception(recipe, against, samples):
        scores.append(_score(space) | {"name": "FID"})
    found = {}
    if against.samples_store is not None:
        found = kept(seen, card, samples, against.samples_store, against.encoder_level, against.vae)
    packages = ("nestgen", "numpy", "torch", *(["torch-fidelity"] if scores[-1].get("name") else []))
    write_json(
        out,
        {
            "scores": scores,
            **({"kept": found} if found else {}),
            "protocol": protocol,
            "samples": card,
            "versions": {name: importlib.metadata.version(name) for name in packages},
        },
    )
    for score in scores:
        print(_line(score))
    if found:
        shares = [
            f"{key} {100 * found[key]:.0f} %" for key in ("class", "features", "colours") if found[key] is not None
        ]
        print(f"kept of the rows, levels frozen from z_{found['frozen_from']}: {', '.join(shares)}")


def _inception(recipe: Recipe, against: Against, samples: Path) -> Space | None:
    named = recipe.evaluation.pictures
    pictures = against.pictures or (None if named is None else recipe.root / named)
    weights = find_weights(against.inception)
    if pictures is not None and weights is not None:
        return inception_space(recipe, pictures, weights, samples)
    if against.inception is not None:
        raise UserError("an FID needs real pictures: name a folder, or an .npz of mu and sigma, with --pictures")
    if against.pictures is not None:
        raise UserError("an FID needs Inception's weights: name the file with --inception")
    return None


def reference_root(recipe: Recipe, named: Path | None) -> Path:
    """The store root to score against: the one named, else the recipe's evaluation.reference, else the training's."""
    if named is not None:
        return named
    own = recipe.evaluation.reference
    return training_root(recipe) if own is None else recipe.root / own


def sample_card(recipe: Recipe, samples: Path) -> dict[str, Any]:
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


def _score(space: Space) -> dict[str, Any]:
    """The scores of samples against the reference, the floor, and what they were computed on."""

    def against(what: str, vectors: Any, reference: Statistics) -> dict[str, Any]:
        try:
            return measure(vectors, reference)
        except ValueError as error:
            raise UserError(f"{what} cannot be scored in {space.name}: {error}") from None

    count = len(space.samples_ND)
    try:
        reference = space.reference()
    except ValueError as error:
        raise UserError(f"the reference cannot be scored in {space.name}: {error}") from None
    score = {"space": space.name, **against(f"the {count} samples", space.samples_ND, reference)}
    score |= {"samples": count, **space.about, "reference": space.origin}
    if space.floor is not None:  # as many training rows as samples, so that both carry the same bias
        floor_ND = space.floor(count)
        score["floor"] = against("the training rows", floor_ND, reference) | {
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
    return f"{score['space']:<12} {', '.join(parts)}; {on}"
