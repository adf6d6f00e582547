"""The folder of a run: what it was begun with, how it goes on, and what a person reads there."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nestgen.denoiser.config import denoiser_config
from nestgen.errors import UserError
from nestgen.files import replacing, write_json
from nestgen.recipe.sections import shape_name
from nestgen.runs import loss_log as losses
from nestgen.runs.checkpoint import Checkpoint, checkpoints
from nestgen.text import short
from nestgen.training.feed import Feed

# Training options that do not decide the weights of a given step, beyond rounding: they may change as a run goes on.
FREE = {"steps", "checkpoint_every", "keep", "preview", "trackers"}
FREE |= {"accumulate", "compile", "checkpoint_activations", "shard"}


def describe(feed: Feed, init: str | None = None) -> dict[str, Any]:
    """What a checkpoint records besides its step (checkpoint.py), as plain JSON values.

    `init` is the digest of the file that the first weights are from.
    """
    recipe, level = feed.recipe, feed.level
    fingerprints = {f"z{level}": feed.z.attributes["fingerprint"]}
    for above, store in zip(recipe.conditions(level), feed.above):
        fingerprints[f"z{above}"] = store.attributes["fingerprint"]
    if feed.labels is not None:
        fingerprints["labels"] = hashlib.sha256(feed.labels.tobytes()).hexdigest()
    if feed.captions is not None:
        fingerprints["text"] = feed.captions.text.attributes["fingerprint"]
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
        "init": init,
        "versions": {name: importlib.metadata.version(name) for name in ("nestgen", "torch", "accelerate")},
    }
    return json.loads(json.dumps(meta))


def _decisive(meta: dict[str, Any]) -> dict[str, Any]:
    """What decides the weights of a given step, by dotted name."""
    level = meta["level"]
    above = range(level + 1, level + 1 + len(meta["denoiser"]["condition_shapes"]))
    parts = {
        "seed": {"": meta["seed"]},
        "init": {"": meta["init"]},
        f"levels[{level}]": {"shift": meta["levels"][level]["shift"]},
        **{f"levels[{one}]": {"sigma": meta["levels"][one]["sigma"]} for one in above},
        "training": {key: value for key, value in meta["training"].items() if key not in FREE},
        **{key: meta[key] or {} for key in ("denoiser", "process", "stores", "codec")},
    }
    return {f"{part}.{key}".rstrip("."): value for part, keys in parts.items() for key, value in keys.items()}


def find_checkpoint(folder: Path, meta: dict[str, Any], say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to go on from; says which ones were cut short.

    Raises UserError, listing what changed, where the run was begun with other settings or stores. Without an `init` the
    one it was begun with holds.
    """
    for found in checkpoints(folder):
        if isinstance(found, Path):
            say(f"{found} was cut short and is passed over")
            continue
        old, new = _decisive(found.meta), _decisive(meta | {"init": meta["init"] or found.meta["init"]})
        changed = [
            f"{key} was {short(old.get(key))} and is {short(new.get(key))}"
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


@contextmanager
def only_training(folder: Path) -> Iterator[None]:
    """Holds the lock of a run's folder; the system lets go of it whatever ends the process.

    Raises UserError where another training has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"{folder} is being trained by another process ({lock.read().strip()}); wait for it, or stop it with Ctrl-C"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield


def lay_folder(folder: Path, recipe_file: Path, meta: dict[str, Any], parameters: int, step: int) -> None:
    """Writes recipe.yaml and config.json and forgets what was recorded after `step`."""
    with replacing(folder / "recipe.yaml") as draft:
        draft.write_bytes(recipe_file.read_bytes())
    write_json(folder / "config.json", {"parameters": parameters, **meta})
    for name in ("log.jsonl", "scores.jsonl"):
        losses.truncate(folder / name, step)


def best_step(folder: Path) -> int | None:
    """The step of the lowest latent Fréchet distance so far (preview.py)."""
    scores = losses.read(folder / "scores.jsonl")
    return min(scores, key=lambda score: score["frechet_distance"])["step"] if scores else None


def write_status(folder: Path, meta: dict[str, Any], state: str) -> None:
    """Writes README.md: what a person wants to know of a run's folder."""
    level, log = meta["level"], losses.read(folder / "log.jsonl")
    given = ", ".join(f"z_{level + 1 + k}" for k in range(len(meta["denoiser"]["condition_shapes"])))
    lines = [
        f"# {folder.name}",
        "",
        f"Denoiser of z_{level} ({shape_name(meta['denoiser']['shape'])}), {f'given {given}' if given else 'the top level'}.",
        f"{state}.",
    ]
    if log and log[-1]["loss"] is not None:
        lines[-1] += f" Loss {log[-1]['loss']:.4f} at step {log[-1]['step']}."
    if skipped := sum(line.get("skipped", 0) for line in log):
        lines.append(f"{skipped} steps were skipped, as their gradient was not finite.")
    steps = [int(path.name) for path in sorted((folder / "checkpoints").glob("[0-9]" * 8))]
    best, scores = best_step(folder), losses.read(folder / "scores.jsonl")
    lines += ["", "| checkpoint | latent Fréchet distance | |", "|---|---|---|"]
    for step in steps:
        distance = next((f"{one['frechet_distance']:.3f}" for one in scores if one["step"] == step), "")
        lines.append(f"| checkpoints/{step:08d} | {distance} | {'best' if step == best else ''} |")
    previews = sorted(path.name for path in (folder / "previews").glob("*.png"))
    for name in ["loss.png"] * (folder / "loss.png").is_file() + [f"previews/{name}" for name in previews[-1:]]:
        lines += ["", f"![]({name})"]
    with replacing(folder / "README.md") as draft:
        draft.write_text("\n".join(lines) + "\n", encoding="utf-8")
