"""The folder of a run: what it was begun with, how it goes on, and what a person reads there."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nestgen import losses
from nestgen.checkpoint import Checkpoint, checkpoints
from nestgen.denoiser import denoiser_config
from nestgen.errors import UserError
from nestgen.feed import Feed
from nestgen.files import replacing, write_json

# Training options that do not decide the weights of a given step: they may change when a run goes on.
FREE = {"steps", "checkpoint_every", "keep"}


def describe(feed: Feed) -> dict[str, Any]:
    """What a checkpoint records besides its step (checkpoint.py), as plain JSON values."""
    recipe, level = feed.recipe, feed.level
    fingerprints = {f"z{level}": feed.z.attributes["fingerprint"]}
    for above, store in zip(recipe.conditions(level), feed.above):
        fingerprints[f"z{above}"] = store.attributes["fingerprint"]
    if feed.labels is not None:
        fingerprints["labels"] = hashlib.sha256(feed.labels.tobytes()).hexdigest()
    meta = {
        "level": level,
        "depth": len(recipe.levels),
        "denoiser": asdict(denoiser_config(recipe, level)),
        "process": recipe.process.model_dump(),
        "levels": [one.model_dump() for one in recipe.levels],
        "stores": fingerprints,
        "codec": feed.z.attributes.get("codec"),
        "seed": recipe.seed,
        "training": recipe.training.model_dump(),
        "versions": {name: importlib.metadata.version(name) for name in ("nestgen", "torch", "accelerate")},
    }
    return json.loads(json.dumps(meta))


def _decisive(meta: dict[str, Any]) -> dict[str, Any]:
    """What decides the weights of a given step, by dotted name."""
    level = meta["level"]
    above = range(level + 1, level + 1 + len(meta["denoiser"]["condition_shapes"]))
    parts = {
        "seed": {"": meta["seed"]},
        f"levels[{level}]": {"shift": meta["levels"][level]["shift"]},
        **{f"levels[{one}]": {"sigma": meta["levels"][one]["sigma"]} for one in above},
        "training": {key: value for key, value in meta["training"].items() if key not in FREE},
        **{key: meta[key] or {} for key in ("denoiser", "process", "stores", "codec")},
    }
    return {f"{part}.{key}".rstrip("."): value for part, keys in parts.items() for key, value in keys.items()}


def find_checkpoint(folder: Path, meta: dict[str, Any], say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to go on from; says which ones were cut short.

    Raises UserError, listing what changed, where the run was begun with other settings or stores.
    """
    for found in checkpoints(folder):
        if isinstance(found, Path):
            say(f"{found} was cut short and is passed over")
            continue
        old, new = _decisive(found.meta), _decisive(meta)
        changed = [
            f"{key} was {_short(old.get(key))} and is {_short(new.get(key))}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
        if changed:
            raise UserError(
                f"{folder} was begun otherwise: {', '.join(changed)}; "
                "change that back, give the recipe another name, or remove the folder"
            )
        return found
    return None


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 40 else f"{text[:12]}..."


def lay_folder(folder: Path, recipe_file: Path, meta: dict[str, Any], parameters: int, step: int) -> None:
    """Writes recipe.yaml and config.json and forgets the log after `step`."""
    with replacing(folder / "recipe.yaml") as draft:
        draft.write_bytes(recipe_file.read_bytes())
    write_json(folder / "config.json", {"parameters": parameters, **meta})
    losses.truncate(folder / "log.jsonl", step)
