"""Sample folders, sampled and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nestgen.recipe.recipe import Recipe
from nestgen.sampling.conditions import Request
from nestgen.sampling.latents import open_latents
from nestgen.sampling.sample import sample


def sample_folder(recipe: Recipe, out: Path, count: int = 7, seed: int = 0, batch: int = 3, **options: Any) -> Path:
    processes = options.pop("processes", 1)
    sample(recipe, out, Request(count, seed, batch, **options), processes)
    return out


def levels(out: Path, depth: int = 3) -> list[np.ndarray]:
    return [open_latents(out, level).read_all() for level in range(depth)]


def files(out: Path) -> dict[str, bytes]:
    """Every file of a sample folder but the card, whose batch may differ, and the lock."""
    paths = [path for path in out.rglob("*") if path.is_file() and path.name not in ("sample.json", ".lock")]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}
