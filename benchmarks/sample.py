"""Sampling through the hierarchy against its last level alone, and against a plain U-ViT with DPM-Solver++."""

from __future__ import annotations

from math import expm1
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks.plain_uvit import PlainUViT
from benchmarks.side_by_side import out_option, ratio, report, rounds_option, table, take_turns
from benchmarks.train_step import recipe_of
from nestgen.compiler import compile_in_place
from nestgen.denoiser.config import SIZES, denoiser_config
from nestgen.denoiser.flops import count
from nestgen.denoiser.uvit import Denoiser
from nestgen.diffusion.process import betas, level_process
from nestgen.memory import keep_freed_memory
from nestgen.recipe.level_sampling import level_sampling
from nestgen.recipe.recipe import Recipe
from nestgen.sampling.conditions import ImageConditions
from nestgen.sampling.descent import default_device, sample_images
from nestgen.sampling.trained import LevelSampler, TrainedDenoiser


def random_samplers(recipe: Recipe) -> tuple[LevelSampler, ...]:
    """The hierarchy's denoisers with random weights."""
    samplers = []
    for level in range(len(recipe.levels)):
        denoiser = Denoiser(denoiser_config(recipe, level)).requires_grad_(False).eval().to(default_device())
        if default_device().type == "cuda":
            compile_in_place(denoiser)  # as `nestgen sample` does for many images
        trained = TrainedDenoiser(denoiser, level_process(recipe, level), {}, "")
        samplers.append(LevelSampler(level, trained, level_sampling(recipe, level)))
    return tuple(samplers)


@torch.inference_mode()
def plain_loop(net: PlainUViT, z: Tensor, steps: int) -> Tensor:
    """DPM-Solver++ of order 2, multistep, on the discrete process at whole times: as short as such a loop can be."""
    log_alpha = 0.5 * torch.cumsum(torch.log1p(-betas()), 0)
    sigma = torch.sqrt(-torch.expm1(2 * log_alpha))
    lam = (log_alpha - sigma.log()).tolist()
    alpha, sigmas = log_alpha.exp().tolist(), sigma.tolist()
    times = torch.linspace(999, 0, steps + 1).round().long().tolist()
    before, h_before = None, 1.0
    for now, then in zip(times, times[1:]):
        eps = net(z, torch.full((len(z),), now + 1.0, device=z.device))
        x = (z - sigmas[now] * eps) / alpha[now]
        h = lam[then] - lam[now]
        line = x if before is None else x + 0.5 * h / h_before * (x - before)
        z = sigmas[then] / sigmas[now] * z - alpha[then] * expm1(-h) * line
        before, h_before = x, h
    return z


def gflops(recipe: Recipe, guided: float) -> float:
    """Of one image and step, all levels; guidance makes two passes of every level but the top."""
    top = len(recipe.levels) - 1
    return sum(
        count(denoiser_config(recipe, level)).gflops_true * (2 if guided and level < top else 1)
        for level in range(top + 1)
    )


@click.command()
@click.option("--size", type=click.Choice(list(SIZES)), default="nano", show_default=True)
@click.option("--depth", default=3, show_default=True, help="Levels of COCO's hierarchy.")
@click.option("--batch", default=4, show_default=True)
@click.option("--steps", default=6, show_default=True, help="Network calls a level.")
@click.option("--guidance", default=0.0, show_default=True)
@click.option("--precision", type=click.Choice(["float32", "bf16"]), default="float32", show_default=True)
@rounds_option
@out_option
def main(size: str, depth: int, batch: int, steps: int, guidance: float, precision: str, rounds: int, out: Any) -> None:
    """Seconds an image: a plain U-ViT loop, L = 1, and the whole hierarchy beside what its GFlops say."""
    keep_freed_memory()  # for all contenders alike
    settings = {"steps": steps, "guidance": guidance, "sampler": "dpm++-multi", "precision": precision}
    recipes = [recipe_of(size, "no", levels, batch).with_sampling(settings) for levels in (1, depth)]
    one, all_levels = (random_samplers(recipe) for recipe in recipes)
    plain = PlainUViT(32, 4, 2, *SIZES[size]).requires_grad_(False).eval().to(default_device())
    z = torch.randn(batch, 4, 32, 32, device=default_device())

    def run(samplers: tuple[LevelSampler, ...]) -> None:
        sample_images(samplers, range(batch), ImageConditions(0))
        if default_device().type == "cuda":
            torch.cuda.synchronize()

    def run_plain() -> None:
        with torch.autocast(default_device().type, torch.bfloat16, enabled=precision == "bf16"):
            plain_loop(plain, z, steps).cpu()

    contenders = {
        "plain U-ViT, DPM-Solver++": lambda turn: run_plain(),
        "nestgen, L = 1": lambda turn: run(one),
        f"nestgen, L = {depth}": lambda turn: run(all_levels),
    }
    for contender in contenders.values():
        contender(0)
    measured = take_turns(contenders, rounds)
    flops = [gflops(recipes[0], 0.0), gflops(recipes[0], guidance), gflops(recipes[1], guidance)]
    on_gpu = default_device().type == "cuda"
    seconds = [(found.wall if on_gpu else found.cpu) / batch for found in measured.values()]
    lines = [
        [name, f"{took:.3f}", f"{steps * flop:.1f}", ratio(seconds[0], took), f"{measured[name].spread:.0%}"]
        for name, took, flop in zip(measured, seconds, flops)
    ]
    body = table(["loop", "s an image", "GFlops an image", "plain / it", "spread"], lines)
    costs, says = seconds[2] / seconds[1], flops[2] / flops[1]
    body += f"\n\nThe hierarchy costs {costs:.2f} times L = 1; by its GFlops {says:.2f} ({costs / says - 1:+.0%})."
    settings_said = f"batch {batch}, {steps} calls a level, guidance {guidance:g}, {precision}"
    report(f"Sampling, {size}, {settings_said}", body, ["torch"], out)


if __name__ == "__main__":
    main()
