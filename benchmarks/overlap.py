"""Overlapped descent: is it better to start a level while the one above still carries noise?

    python -m benchmarks.overlap --recipe nested.yaml --count 1000 --start 0 --start 0.15 --start 0.3

The level above does not see the one below, so it goes on as if alone; what overlapping changes is the condition that a level gets
at its first calls. A level starts at the first call of the one above whose time is at most START, and from there both go call by
call. START 0 is one level after the other. The condition is, by --condition,

    state     z_t / alpha, which is z + (sigma / alpha) eps: a noised condition as in training
    estimate  the predicted latent x, divided by the share of the level's variance that it has

with as much noise added as is missing to the sigma that the denoiser was trained with. It prints the Fréchet distance of each
level to held-out rows, in the level's own space.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from benchmarks.side_by_side import table
from nestgen import randomness
from nestgen.diffusion.process import Process
from nestgen.diffusion.solvers import sample_level
from nestgen.recipe.recipe import load_recipe
from nestgen.sampling.real import open_real, real_latents, reference_root
from nestgen.sampling.trained import LevelSampler, load_samplers
from nestgen.scoring.frechet import Gaussian, fit_gaussian, gaussian_distance
from nestgen.stores.store import Store

BATCH = 250


@dataclass(frozen=True)
class Call:
    """A network call of a level: its time, what the network got and the latent it predicted."""

    t: float
    z_BCHW: Tensor
    x_BCHW: Tensor

    def condition(self, kind: str, process: Process) -> tuple[Tensor, float]:
        """What the level below is given, and the noise in it: a deviation, of a level whose variance is 1."""
        time = torch.tensor(self.t, dtype=torch.float64)
        if kind == "state":
            alpha = float(process.alpha(time))
            return self.z_BCHW / alpha, float(process.sigma(time)) / alpha
        share = min(1.0, float(self.x_BCHW.var(0).mean()))  # z's variance less the error's
        return self.x_BCHW / share, math.sqrt((1 - share) / share)


def sample_overlapped(
    samplers: tuple[LevelSampler, ...], indices: list[int], seed: int, start: float, kind: str
) -> dict[int, Tensor]:
    """Latents (B, C, H, W) by level, each conditioned on the nearest above. With `start` 0 they are `sample_images`'s."""
    z: dict[int, Tensor] = {}
    calls: list[Call] = []
    for sampler in reversed(samplers):
        h, w, c = sampler.config.shape
        below: list[Call] = []
        denoise = _recorded(_denoise(sampler, z, calls, indices, seed, start, kind), below)
        noise_BCHW = randomness.normal(seed, f"sample/z{sampler.level}", indices, (c, h, w))
        settings = sampler.settings
        with torch.inference_mode():
            z[sampler.level] = sample_level(
                denoise, sampler.trained.process, noise_BCHW, settings.steps, settings.sampler
            )
        calls = below
    return z


def _recorded(denoise: Callable[[Tensor, Tensor], Tensor], calls: list[Call]) -> Callable[[Tensor, Tensor], Tensor]:
    def recorded(z_BCHW: Tensor, t: Tensor) -> Tensor:
        x_BCHW = denoise(z_BCHW, t)
        calls.append(Call(float(t), z_BCHW, x_BCHW))
        return x_BCHW

    return recorded


def _denoise(
    sampler: LevelSampler,
    z: dict[int, Tensor],
    above: list[Call],
    indices: list[int],
    seed: int,
    start: float,
    kind: str,
) -> Callable[[Tensor, Tensor], Tensor]:
    """The guided denoiser of a level, whose condition moves on with the calls of the level above."""
    if not sampler.settings.sigmas:
        return sampler.guided()
    level, (sigma,) = sampler.level + 1, sampler.settings.sigmas
    noise_BCHW = randomness.normal(seed, f"sample/condition/z{level}", indices, z[level].shape[1:])
    given = [call.condition(kind, sampler.trained.process) for call in above if call.t <= start]
    guided = [
        sampler.guided([x_BCHW + math.sqrt(max(0.0, sigma**2 - noise**2)) * noise_BCHW])
        for x_BCHW, noise in [*given, (z[level], 0.0)]
    ]
    moves = iter(guided[:-1])

    def denoise(z_BCHW: Tensor, t: Tensor) -> Tensor:
        return next(moves, guided[-1])(z_BCHW, t)

    return denoise


@click.command()
@click.option("--recipe", "file", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--count", default=1000, show_default=True)
@click.option("--start", "starts", type=float, multiple=True, default=(0.0, 0.15, 0.3), show_default=True)
@click.option("--condition", "kind", type=click.Choice(["state", "estimate"]), default="estimate", show_default=True)
def main(file: Path, count: int, starts: tuple[float, ...], kind: str) -> None:
    """Samples a trained hierarchy with each start and prints the distances."""
    recipe = load_recipe(file)
    samplers = load_samplers(recipe, torch.device("cpu"))
    references = [
        _reference(open_real(recipe, one.level, reference_root(recipe, None)), recipe.seed) for one in samplers
    ]
    rows = []
    for start in starts:
        parts = [
            sample_overlapped(samplers, list(range(first, min(first + BATCH, count))), recipe.seed, start, kind)
            for first in range(0, count, BATCH)
        ]
        distances = [
            gaussian_distance(fit_gaussian(_vectors(torch.cat([part[level] for part in parts]))), reference)
            for level, reference in enumerate(references)
        ]
        rows.append([f"{start:g}", *(f"{distance:.4g}" for distance in distances)])
    print(table(["start", *(f"z_{one.level}" for one in samplers)], rows))


def _reference(store: Store, seed: int) -> Gaussian:
    return fit_gaussian(_vectors(real_latents(store, list(range(store.rows)), seed)))


def _vectors(z_BCHW: Tensor) -> np.ndarray:
    return z_BCHW.flatten(1).double().numpy()


if __name__ == "__main__":
    main()
