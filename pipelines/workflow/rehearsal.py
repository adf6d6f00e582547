"""The recipe that the workflow runs: as given, with keys of --config in place of its own, or made small for a rehearsal."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML

from nestgen.recipe.yaml import read_yaml
from workflow.plan import Plan, RecipeError, has_splits, plan_of

# Keys of the recipe's features that --config may replace, as they depend on the machine.
FEATURE_KEYS = ("source", "out", "weights", "z0_weights", "text_weights", "limit", "views", "precision")
CONFIG_KEYS = ("recipe", "data", *FEATURE_KEYS, "held_out", "pictures", "gpus", "launch", "rehearse")
# What a rehearsal makes small.
IMAGES, SAMPLES = 64, 32
IMAGE_SIZE, Z0_SHAPE = 32, "8x8x8"  # the embedded VAE's z_0 of a scene
MAX_GRID, MAX_CHANNELS = 8, 64  # of the embedded encoder; with so few images its last channels are noise
MAX_SIGMAS = 2
SCORER = "pixels"  # instead of an encoder that only scores
TOWER = Path("tower/model.safetensors")  # a text encoder of random weights
TEXT = {"context_length": 77, "width": 16, "heads": 2, "layers": 1}


def configured(plan: Plan, file: Path, config: Mapping[str, Any]) -> Plan:
    """The plan of the recipe with the keys of --config in it. Raises RecipeError."""
    if unknown := sorted(config.keys() - set(CONFIG_KEYS)):
        raise RecipeError(f"there is no CONFIG key {unknown[0]!r}; the keys are {', '.join(CONFIG_KEYS)}")
    if not str(config.get("gpus") or 0).isdecimal():
        raise RecipeError(f"CONFIG gpus is {config['gpus']!r}, but must be how many GPUs there are")
    document = copy.deepcopy(dict(plan.document))
    document["features"] |= {key: config[key] for key in FEATURE_KEYS if key in config}
    if "pictures" in config:
        document["evaluation"] = {**(document.get("evaluation") or {}), "pictures": config["pictures"]}
    if config.get("held_out"):
        document["grid"] = {**(document.get("grid") or {}), "held_out": config["held_out"]}
    plan = plan_of(rehearsed(document, config) if config.get("rehearse") else document, file)
    source = plan.features.get("source")
    if plan.evaluation.get("reference") and not plan.grid.held_out and not has_splits(source):
        raise RecipeError(
            f"{file}: evaluation.reference needs held-out images, and {source!r} has no split of them; give their SOURCE as "
            "grid.held_out or CONFIG=held_out=SOURCE"
        )
    return plan


def rehearsed(document: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The same levels and jobs with 64 images, 32 samples, nano networks and 20 steps, in the embedded encoder and VAE.

    A rehearsal leaves out the recipe's own encoders, VAE and text tower, so it needs no weights (captions go through a
    small tower of random weights); all σ but the first two, all seeds but one, channels of a level beyond 64, and the
    linear part of denoisers.
    z_0 is 8x8x8. Images are scenes unless --config names a source.
    """
    text = document["features"].get("text")
    small = copy.deepcopy(dict(document))
    small["name"] = f"{document['name']}-rehearsal"
    small["features"] = {
        "source": config.get("source", f"scenes:{IMAGE_SIZE}"),
        "out": "stores/train",
        "encoder": "tiny",
        "z0": f"vae:{IMAGE_SIZE}",
        "z0_weights": "tiny",
        "limit": IMAGES,
        "views": document["features"].get("views", 1),
        **({"text": text, "text_weights": str(TOWER)} if text else {}),
    }
    small["levels"] = [{"shape": Z0_SHAPE}, *map(_small_level, document["levels"][1:])]
    small["denoiser"] = {**(document.get("denoiser") or {}), "size": "nano"}
    small["denoiser"].pop("gaussian", None)  # it needs more images than levels have values
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
    reference = (document.get("evaluation") or {}).get("reference")
    small["evaluation"] = {"count": SAMPLES, **({"reference": "stores/val"} if reference else {})}
    if grid := dict(document.get("grid") or {}):
        for key in ("seeds", "pretrained"):
            grid.pop(key, None)
        if grid.get("scored_by"):
            grid["scored_by"] = {"encoder": SCORER}
        if not config.get("held_out"):
            grid.pop("held_out", None)
        if grid.get("sigmas"):
            grid["sigmas"] = grid["sigmas"][:MAX_SIGMAS]
        small["grid"] = grid
    return small


def _small_level(level: Mapping[str, Any]) -> dict[str, Any]:
    h, w, c = (int(part) for part in str(level["shape"]).split("x"))
    return {**level, "shape": f"{min(h, MAX_GRID)}x{min(w, MAX_GRID)}x{min(c, MAX_CHANNELS)}"}


def write_recipes(plan: Plan, file: Path, config: Mapping[str, Any]) -> None:
    """Write the recipes of all steps into the working directory.

    nested.yaml         the experiment's; the recipe's own text, comments included, where it says all
    nested-seedN.yaml   one for each further seed
    scored.yaml         the features in which sample images are encoded

    Makes the link data/ too and, for a rehearsal with captions, the small text tower.
    """
    if config.get("data") and not Path("data").exists():
        Path("data").symlink_to(Path(config["data"]).resolve(), target_is_directory=True)
    is_as_given = read_yaml(file) == plan.document
    _write(Path("nested.yaml"), file.read_text(encoding="utf-8") if is_as_given else to_yaml(plan.document))
    for seed in plan.seeds:
        if seed is not None:
            document = {**plan.document, "name": plan.run_name(seed), "seed": seed}
            _write(Path(f"nested-seed{seed}.yaml"), to_yaml(document))
    _write(Path("scored.yaml"), to_yaml({"features": scored_features(plan)}))
    if plan.features.get("text_weights") == str(TOWER):
        write_tower(TOWER)


def scored_features(plan: Plan) -> dict[str, Any]:
    """The section `features` for sample images: the encoder that scores them, and no source."""
    features, scored_by = plan.features, plan.grid.scored_by
    encoder = {key: features[key] for key in ("encoder", "weights", "model_args") if key in features}
    if scored_by:
        encoder = {key: value for key, value in scored_by.model_dump().items() if value}
    same = {key: features[key] for key in ("precision", "crop", "icc") if key in features}
    # No z_0 of a sample is needed, so the smallest there is.
    return {**encoder, **same, "out": "stores/samples", "z0": "pixels:8"}


def write_tower(file: Path) -> None:
    """Write a small text encoder in OpenAI's layout, always the same, with the two description files that belong to it."""
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
    rng = np.random.default_rng(0)
    state = {name: rng.normal(0, width**-0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    state |= {f"{norm}.weight": np.ones(width, np.float32) for norm in norms}
    state |= {f"{norm}.bias": np.zeros(width, np.float32) for norm in norms}
    file.parent.mkdir(exist_ok=True)
    _write(file.with_suffix(".json"), json.dumps({"model_args": TEXT}))
    _write(file.with_name("config.json"), json.dumps({"model_type": "clip"}))  # its activation is QuickGELU
    save_file(state, file)


def to_yaml(document: Mapping[str, Any]) -> str:
    """The document as YAML 1.2, which both packages read."""
    text = io.StringIO()
    YAML().dump(dict(document), text)
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
