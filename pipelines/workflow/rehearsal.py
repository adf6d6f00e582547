"""The recipe that the workflow runs: the one given, with keys of --config laid over it, or made small enough for a rehearsal."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from workflow.plan import Plan, plan_of

# Keys of the recipe's features that --config may give: where things are on this machine.
PLACES = ("source", "out", "weights", "z0_weights", "text_weights", "limit", "views", "precision")
PICTURES, SAMPLES = 64, 32
SIDE, LATENT = 32, "8x8x8"  # the embedded VAE's z_0 of a scene
GRID, CHANNELS = 8, 64  # of the embedded encoder, whose last channels say nothing of so few pictures
SIGMAS = 2  # of those that are tried
SCORER = "pixels"  # in place of an encoder that scores but does not make the levels
TOWER = Path("tower/model.safetensors")  # a text encoder of random weights
TEXT = {"context_length": 77, "width": 16, "heads": 2, "layers": 1}


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
    """The same levels and jobs with 64 pictures, 32 samples, nano networks and 20 steps, in the embedded encoder and VAE.

    What a rehearsal leaves out: the recipe's own encoders, VAE and text tower, whose weights it does without (captions go
    through a small tower of random weights); more than the first two σ, and all seeds but one; channels of a level beyond 64.
    z_0 is 8x8x8. Pictures are scenes unless --config names a source.
    """
    text = document["features"].get("text")
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
        **({"text": text, "text_weights": str(TOWER)} if text else {}),
    }
    small["levels"] = [{"shape": LATENT}, *map(_small_level, document["levels"][1:])]
    small["denoiser"] = {**(document.get("denoiser") or {}), "size": "nano"}
    if text:
        small["denoiser"]["text"] = f"{TEXT['context_length']}x{TEXT['width']}"
    small["training"] = {
        **(document.get("training") or {}),
        "steps": 20,
        "batch": 8,
        "warmup": 2,
        "checkpoint_every": 10,
        "preview": 8,
        "precision": "no",
        "keep": 1,
    }
    small["sampling"] = {**(document.get("sampling") or {}), "steps": 4, "batch": SAMPLES}
    held_out = (document.get("evaluation") or {}).get("reference")
    small["evaluation"] = {"count": SAMPLES, **({"reference": "stores/val"} if held_out else {})}
    if grid := dict(document.get("grid") or {}):
        grid.pop("seeds", None)
        if grid.get("scored_by"):
            grid["scored_by"] = {"encoder": SCORER}
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
    """nested.yaml, one for each further seed, scored.yaml, by which sample pictures are encoded, and the link data/; for a
    rehearsal with captions the text encoder too."""
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
    if plan.document["features"].get("text_weights") == str(TOWER):
        write_tower(TOWER)


def scored_features(plan: Plan) -> dict[str, Any]:
    """What an extraction of sample pictures takes from the recipe: the encoder that scores them, and not its source."""
    features, scored_by = plan.document["features"], plan.grid.scored_by
    taken = {key: features[key] for key in ("encoder", "weights", "model_args") if key in features}
    if scored_by:
        taken = {key: value for key, value in scored_by.model_dump().items() if value}
    kept = {key: features[key] for key in ("precision", "crop") if key in features}
    # No z_0 of a sample is needed, so the smallest there is.
    return {**taken, **kept, "out": "stores/samples", "z0": "pixels:8"}


def write_tower(file: Path) -> None:
    """A text encoder in OpenAI's layout that is small and always the same, with the descriptions that belong beside it."""
    from safetensors.numpy import save_file

    width = TEXT["width"]
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (TEXT["context_length"], width),
        "token_embedding.weight": (49408, width),
    }
    norms = ["ln_final"]
    for layer in range(TEXT["layers"]):
        stem = f"transformer.resblocks.{layer}"
        norms += [f"{stem}.ln_1", f"{stem}.ln_2"]
        shapes |= {f"{stem}.attn.in_proj_weight": (3 * width, width), f"{stem}.attn.in_proj_bias": (3 * width,)}
        linears = {"attn.out_proj": (width, width), "mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}
        for name, (out, into) in linears.items():
            shapes |= {f"{stem}.{name}.weight": (out, into), f"{stem}.{name}.bias": (out,)}
    dice = np.random.default_rng(0)
    state = {name: dice.normal(0, width**-0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    state |= {f"{norm}.weight": np.ones(width, np.float32) for norm in norms}
    state |= {f"{norm}.bias": np.zeros(width, np.float32) for norm in norms}
    file.parent.mkdir(exist_ok=True)
    _write(file.with_suffix(".json"), json.dumps({"model_args": TEXT}))
    _write(file.with_name("config.json"), json.dumps({"model_type": "clip"}))  # whose activation is QuickGELU
    save_file(state, file)


def _yaml(document: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
