"""The folder of a run: the settings it was started with, how it goes on, and what a person reads there."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nestgen.denoiser.config import denoiser_config
from nestgen.errors import UserError
from nestgen.files import atomic_write, read_json, sha256_of, write_json
from nestgen.locks import folder_lock
from nestgen.recipe.recipe import Recipe, load_recipe
from nestgen.recipe.sections import shape_name
from nestgen.runs import loss_log, scores
from nestgen.runs.checkpoint import Checkpoint, check_room, checkpoint_folders, config_from_meta, newest
from nestgen.stores.hierarchy import LevelStores
from nestgen.text import short

# Training options that do not decide the weights of a given step, beyond rounding: they may change as a run goes on.
FREE = {"steps", "checkpoint_every", "keep", "preview", "trackers"}
FREE |= {"micro_batch", "compile", "checkpoint_activations", "shard"}
FREE |= {"accumulate"}  # of version 0.1.0
# Those that decide the weights and may still change as a run goes on, where that is asked for.
ADJUSTABLE = {"training.lr", "training.warmup", "training.clip", "training.steps"}


def describe_run(recipe: Recipe, level: int, stores: LevelStores, init: str | None = None) -> dict[str, Any]:
    """What a checkpoint records besides its step (checkpoint.py), as plain JSON values.

    `init` is the SHA-256 of the file that the first weights are from.
    """
    fingerprints = {f"z{level}": stores.z.attributes["fingerprint"]}
    for above, store in zip(recipe.conditions(level), stores.above):
        fingerprints[f"z{above}"] = store.attributes["fingerprint"]
    if stores.labels is not None:
        fingerprints["labels"] = hashlib.sha256(stores.labels.tobytes()).hexdigest()
    if stores.captions is not None:
        fingerprints["text"] = stores.captions.text.attributes["fingerprint"]
    if stores.features is not None:
        fingerprints["features"] = stores.features.attributes["fingerprint"]
    meta = {
        "level": level,
        "depth": len(recipe.levels),
        "denoiser": asdict(denoiser_config(recipe, level)),
        "process": recipe.process.model_dump(exclude_none=True),
        "levels": [one.model_dump() for one in recipe.levels],
        "stores": fingerprints,
        "codec": stores.z.attributes.get("codec"),
        "seed": recipe.seed,
        "training": recipe.training.model_dump(),
        "init": init,
        "versions": {name: importlib.metadata.version(name) for name in ("nestgen", "torch", "accelerate", "numpy")},
    }
    return json.loads(json.dumps(meta))


def _decisive(meta: dict[str, Any]) -> dict[str, Any]:
    """What decides the weights of a given step, by dotted name."""
    level, training = meta["level"], meta["training"]
    # The number of steps is decisive where the learning rate or the alignment ends with it.
    free = FREE - {"steps"} if training.get("lr_decay") in ("linear", "cosine") or training.get("align") else FREE
    above = range(level + 1, level + 1 + len(meta["denoiser"]["condition_shapes"]))
    parts = {
        "seed": {"": meta["seed"]},
        "init": {"": meta["init"]},
        f"levels[{level}]": {"shift": meta["levels"][level]["shift"]},
        **{f"levels[{one}]": {"sigma": meta["levels"][one]["sigma"]} for one in above},
        "training": {key: value for key, value in training.items() if key not in free},
        "denoiser": asdict(config_from_meta(meta)),  # with what later versions added
        **{key: meta[key] or {} for key in ("process", "stores", "codec")},
    }
    return {f"{part}.{key}".rstrip("."): value for part, keys in parts.items() for key, value in keys.items()}


def find_checkpoint(folder: Path, meta: dict[str, Any], requested: Collection[str] = ()) -> Checkpoint | None:
    """The checkpoint to go on from, the newest one.

    Raises UserError if it is damaged and, listing what changed, if the run was started with other settings or stores.
    Without an `init` the one it was started with holds. `requested` are training options that may change if they are
    ADJUSTABLE.
    """
    checkpoint = newest(folder)
    if checkpoint is None:
        return None
    old = _decisive(checkpoint.meta)
    new = _decisive(meta | {"init": meta["init"] or checkpoint.meta["init"]})
    old.setdefault("stores.features", new.get("stores.features"))  # earlier versions did not record them
    allowed = ADJUSTABLE & {f"training.{key}" for key in requested}
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key) and key not in allowed]
    if changed:
        listed = ", ".join(f"{key} was {short(old.get(key))} and is {short(new.get(key))}" for key in changed)
        keys = " ".join(f"--set {key.removeprefix('training.')}=..." for key in changed)
        or_else = f", or go on with the new values by `{keys}`" if ADJUSTABLE.issuperset(changed) else ""
        raise UserError(
            f"{folder} was started with other settings: {listed}; "
            f"change that back, give the recipe another name, or remove the folder{or_else}"
        )
    return checkpoint


def training_lock(folder: Path) -> AbstractContextManager[None]:
    """Holds the lock of a run's folder. Raises UserError if another training holds it."""
    return folder_lock(folder, "is being trained")


def prepare_folder(folder: Path, recipe_file: Path, meta: dict[str, Any], parameters: int, step: int) -> None:
    """Writes recipe.yaml and config.json and removes what was logged after `step`.

    Raises UserError where the disk has no room for the checkpoints.
    """
    check_room(folder, parameters, meta["training"]["keep"])
    recipe = recipe_file.read_bytes()
    with atomic_write(folder / "recipe.yaml") as draft:
        draft.write_bytes(recipe)
    digest = hashlib.sha256(recipe).hexdigest()
    write_json(folder / "config.json", {"parameters": parameters, **meta, "recipe_sha256": digest})
    for name in ("log.jsonl", "held-out.jsonl"):
        loss_log.truncate(folder / name, step)
    scores.truncate(folder, step)
    for leftover in (folder / "snapshots").glob(".*.part"):  # of killed trainings, each as large as the model
        leftover.unlink()


def read_recipe(folder: Path) -> Recipe:
    """The recipe of a run, recipe.yaml, which may leave its name to the folder. Raises UserError where it is not what the
    training wrote.
    """
    file, config = folder / "recipe.yaml", folder / "config.json"
    recorded = read_json(config).get("recipe_sha256") if config.is_file() else None
    if recorded not in (None, sha256_of(file)):
        raise UserError(
            f"{file} is damaged (its SHA-256 is not the one in {config.name}); copy the recipe that was trained to it again"
        )
    return load_recipe(file, folder.resolve().parent.name)


def best_step(folder: Path) -> int | None:
    """The step of the lowest latent Fréchet distance so far (training/preview.py); None before the first preview."""
    found = scores.read(folder)
    return min(found, key=lambda score: score["frechet_distance"])["step"] if found else None


def is_scored(folder: Path, step: int) -> bool:
    """Whether a step has a preview, and so counts for `best_step`."""
    return any(score["step"] == step for score in scores.read(folder))


def write_status(folder: Path, meta: dict[str, Any], state: str) -> None:
    """Writes README.md: what a person wants to know of a run's folder."""
    level, log = meta["level"], loss_log.read(folder / "log.jsonl", "loss")
    conditions = ", ".join(f"z_{level + 1 + k}" for k in range(len(meta["denoiser"]["condition_shapes"])))
    lines = [
        f"# {folder.name}",
        "",
        f"Denoiser of z_{level} ({shape_name(meta['denoiser']['shape'])}), "
        f"{f'conditioned on {conditions}' if conditions else 'the top level'}.",
        f"{state}.",
    ]
    if log and log[-1]["loss"] is not None:
        lines[-1] += f" Loss {log[-1]['loss']:.4f} at step {log[-1]['step']}."
    if skipped := sum(line.get("skipped", 0) for line in log):
        lines.append(f"{skipped} steps were skipped, as their gradient was not finite.")
    steps = [int(path.name) for path in checkpoint_folders(folder)]
    best, found = best_step(folder), scores.read(folder)
    lines += ["", "| checkpoint | latent Fréchet distance | |", "|---|---|---|"]
    for step in steps:
        distance = next((f"{one['frechet_distance']:.3f}" for one in found if one["step"] == step), "")
        lines.append(f"| checkpoints/{step:08d} | {distance} | {'best' if step == best else ''} |")
    previews = sorted(path.name for path in (folder / "previews").glob("*.png"))
    for name in ["loss.png"] * (folder / "loss.png").is_file() + [f"previews/{name}" for name in previews[-1:]]:
        lines += ["", f"![]({name})"]
    with atomic_write(folder / "README.md") as draft:
        draft.write_text("\n".join(lines) + "\n", encoding="utf-8")
