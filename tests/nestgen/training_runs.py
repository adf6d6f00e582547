"""What trainings leave, read."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file

from nestgen.denoiser.uvit import initial_denoiser
from nestgen.recipe.locations import run_dir
from nestgen.recipe.recipe import Recipe
from nestgen.runs.checkpoint import PARTS, newest

LITTLE = (32, 2, 2)  # D, depth and heads that prove of a training what nano's do, in a fifth of the time
SHRINK = f"from nestgen.denoiser import config; config.SIZES['nano'] = {LITTLE}"
TRAIN = f"{SHRINK}; from nestgen.training.train import train; train(recipe, 0)"


def parts(recipe: Recipe) -> dict[str, bytes]:
    """The bytes of the newest checkpoint's weights, average and optimiser."""
    checkpoint = newest(run_dir(recipe, 0))
    assert checkpoint is not None
    return {part: (checkpoint.path / f"{part}.safetensors").read_bytes() for part in PARTS}


def steps_kept(recipe: Recipe) -> list[str]:
    """Names below checkpoints/."""
    return sorted(path.name for path in (run_dir(recipe, 0) / "checkpoints").iterdir())


def raw_log(recipe: Recipe) -> list[dict[str, Any]]:
    """Lines of log.jsonl."""
    return [json.loads(line) for line in (run_dir(recipe, 0) / "log.jsonl").read_text().splitlines()]


def log(recipe: Recipe) -> list[dict[str, float]]:
    """Lines of log.jsonl without the speed."""
    return [{key: line[key] for key in ("step", "loss", "lr")} for line in raw_log(recipe)]


def wait_for_checkpoint(recipe: Recipe, step: int, ended: Callable[[], int | None], level: int = 0) -> None:
    """Until a checkpoint of a step or a later one is there."""
    folder = run_dir(recipe, level) / "checkpoints"
    while max((int(path.name) for path in folder.glob("[0-9]" * 8)), default=0) < step:
        assert ended() is None, "it ended before"
        time.sleep(0.002)


def initial(recipe: Recipe) -> dict[str, torch.Tensor]:
    """First weights of z_0's denoiser."""
    return dict(initial_denoiser(recipe, 0).state_dict())


def apart(one: Recipe, other: Recipe) -> float:
    """How far two runs' last weights are apart, as a share of how far one has moved from its first ones."""
    found = [newest(run_dir(recipe, 0)) for recipe in (one, other)]
    a, b = (load_file(checkpoint.path / "denoiser.safetensors") for checkpoint in found if checkpoint is not None)
    assert a.keys() == b.keys()
    moved = sum((a[name] - value).double().square().sum() for name, value in initial(one).items()) ** 0.5
    return float(sum((a[name] - b[name]).double().square().sum() for name in a) ** 0.5 / moved)
