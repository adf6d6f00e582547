"""Averages of any length after a training: snapshots of power-function averages, and their combinations (ema.py)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestgen.errors import UserError
from nestgen.recipe.locations import run_dir
from nestgen.recipe.recipe import Recipe
from nestgen.runs import ema
from nestgen.runs.checkpoint import checkpoint_folders, newest, write_checkpoint
from nestgen.runs.folder import read_recipe
from nestgen.tensors import load_tensors, save_tensors


def save_snapshot(folder: Path, step: int, length: float, tensors: Mapping[str, Tensor]) -> None:
    """Writes snapshots/<step>-<length>.safetensors of a run."""
    save_tensors(folder / "snapshots" / f"{step:08d}-{length:g}.safetensors", tensors)


def reconstruct(recipe: Recipe, level: int, length: float, name: str, step: int | None = None) -> Path:
    """Writes the average of a length at a step as the run `name`, which can be sampled from; returns its folder.

    The step is that of the newest snapshot by default. Raises UserError if there are no snapshots, or `name` is a
    run already.
    """
    folder = run_dir(recipe, level)
    target = folder.parent.parent / name / folder.name
    if checkpoint_folders(target):
        raise UserError(f"{target} has a checkpoint; give another --name, or remove it")
    tensors, meta = average(folder, length, step)
    has_recipe = (folder / "recipe.yaml").is_file()
    if has_recipe:
        read_recipe(folder)  # whether it is damaged
    write_checkpoint(target, {"ema": tensors}, meta)
    if has_recipe:  # beside it the run can be sampled from in Python too
        for name in ("recipe.yaml", "config.json"):
            if (folder / name).is_file():
                shutil.copy(folder / name, target / name)
    return target


def average(folder: Path, length: float, step: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The average of a length at a step, made of the snapshots of a run's folder, and the `meta` of its checkpoint.

    The step is that of the newest snapshot by default. Raises UserError if there are no snapshots.
    """
    files = {
        ema.Profile(int(file.stem[:8]), float(file.stem[9:])): file
        for file in (folder / "snapshots").glob("*-*.safetensors")
    }
    checkpoint = newest(folder)
    if not files or checkpoint is None:
        raise UserError(f"{folder} has no snapshots; train with training.ema_snapshots set to the steps between them")
    if not 0 < length < ema.LONGEST:
        raise UserError(f"--length is {length:g}; give one between 0 and {ema.LONGEST}")
    steps = [profile.step for profile in files]
    first, last = min(steps), max(steps)
    step = last if step is None else step
    if not first <= step <= last:
        raise UserError(f"step {step} is not within {first}..{last}, the steps of the snapshots in {folder}")
    profiles = sorted(files, key=lambda profile: (profile.step, profile.length))
    factors = ema.combination(profiles, ema.Profile(step, length))
    tensors = _combined([files[profile] for profile in profiles], factors.tolist())
    return tensors, {**checkpoint.meta, "step": step, "ema_length": length}


def _combined(files: list[Path], factors: list[float]) -> dict[str, Tensor]:
    """The sum of factor times file, in float64, one file in memory at a time; buffers are the same in all."""
    total: dict[str, Tensor] = {}
    for file, factor in zip(files, factors):
        for name, tensor in load_tensors(file).items():
            value = factor * tensor.double()
            total[name] = total[name] + value if name in total else value
    return {name: value.to(torch.float32) for name, value in total.items()}
