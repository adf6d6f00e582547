"""The recipe that the workflow runs: the one given, with keys of --config laid over it, or made small enough for a rehearsal."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from grid import Plan, plan_of

# Keys of the recipe's features that --config may give: where things are on this machine.
PLACES = ("source", "out", "weights", "z0_weights", "text_weights", "limit", "views", "precision")
PICTURES = 64
SIDE, LATENT = 32, "8x8x8"  # the embedded VAE's z_0 of a scene
GRID, CHANNELS = 8, 128  # of the embedded encoder
SIGMAS = 2  # of those that are tried


def configured(plan: Plan, file: Path, config: Mapping[str, Any]) -> Plan:
    """The plan that --config asks for. Raises RecipeError."""
    document = copy.deepcopy(dict(plan.document))
    document["features"] |= {key: config[key] for key in PLACES if key in config}
    if "pictures" in config:
        document["evaluation"] = {**(document.get("evaluation") or {}), "pictures": config["pictures"]}
    if config.get("held_out"):
        document["grid"] = {**(document.get("grid") or {}), "held_out": config["held_out"]}
    return plan_of(rehearsed(document, config) if config.get("rehearse") else document, file)


def rehearsed(document: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The same levels and jobs with 64 pictures, nano networks and 20 steps, in the embedded encoder and VAE.

    What a rehearsal leaves out: the recipe's own encoder, VAE and text tower, whose weights it does without, and so captions;
    more than the first two σ, and all seeds but one; channels of a level beyond the embedded encoder's 128. z_0 is 8x8x8.
    Pictures are scenes unless --config names a source.
    """
    small = copy.deepcopy(dict(document))
    small["name"] = f"{document['name']}-rehearsal"
    small["features"] = {
        "source": config.get("source", f"scenes:{SIDE}"),
        "out": "stores/train",
        "encoder": "tiny",
        "z0": f"vae:{SIDE}",
        "z0_weights": "tiny",
        "limit": PICTURES,
        "views": document["features"].get("views", 1),
    }
    small["levels"] = [{"shape": LATENT}, *map(_small_level, document["levels"][1:])]
    small["denoiser"] = {**(document.get("denoiser") or {}), "size": "nano"}
    small["denoiser"].pop("text", None)
    small["training"] = {
        **(document.get("training") or {}),
        "steps": 20,
        "batch": 16,
        "warmup": 2,
        "checkpoint_every": 10,
        "precision": "no",
        "keep": 1,
    }
    small["sampling"] = {**(document.get("sampling") or {}), "steps": 4, "batch": PICTURES}
    held_out = (document.get("evaluation") or {}).get("reference")
    small["evaluation"] = {"count": PICTURES, **({"reference": "stores/val"} if held_out else {})}
    if grid := dict(document.get("grid") or {}):
        grid.pop("seeds", None)
        grid.pop("scored_by", None)
        if not config.get("held_out"):
            grid.pop("held_out", None)
        if grid.get("sigmas"):
            grid["sigmas"] = grid["sigmas"][:SIGMAS]
        small["grid"] = grid
    return small


def _small_level(level: Mapping[str, Any]) -> dict[str, Any]:
    h, w, c = (int(part) for part in str(level["shape"]).split("x"))
    return {**level, "shape": f"{min(h, GRID)}x{min(w, GRID)}x{min(c, CHANNELS)}"}


def write_recipes(plan: Plan, file: Path, config: Mapping[str, Any]) -> None:
    """nested.yaml, one for each further seed, scored.yaml, by which sample pictures are encoded, and the link data/."""
    given = not any(config.get(key) for key in (*PLACES, "pictures", "held_out", "rehearse"))
    nested = file.read_text(encoding="utf-8") if given else _yaml(plan.document)
    if config.get("data") and not Path("data").exists():
        Path("data").symlink_to(Path(config["data"]).resolve(), target_is_directory=True)
    _write(Path("nested.yaml"), nested)
    for seed in plan.seeds:
        if seed is not None:
            own = replace(plan, document={**plan.document, "name": plan.run_name(seed), "seed": seed})
            _write(Path(f"nested-seed{seed}.yaml"), _yaml(own.document))
    _write(Path("scored.yaml"), _yaml({"features": scored_features(plan)}))


def scored_features(plan: Plan) -> dict[str, Any]:
    """What an extraction of sample pictures takes from the recipe: the encoder that scores them, and not its source."""
    features, scored_by = plan.document["features"], plan.grid.scored_by
    taken = {key: features[key] for key in ("encoder", "weights", "model_args") if key in features}
    if scored_by:
        taken = {key: value for key, value in scored_by.model_dump().items() if value}
    kept = {key: features[key] for key in ("precision", "crop") if key in features}
    # No z_0 of a sample is needed, so the smallest there is.
    return {**taken, **kept, "out": "stores/samples", "z0": "pixels:8"}


def _yaml(document: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
