"""A training step of the level-0 denoiser against the published U-ViT's, and what the condition path costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from accelerate import Accelerator

from benchmarks.plain_uvit import PlainTraining, PlainUViT
from benchmarks.side_by_side import out_option, ratio, report, rounds_option, table, take_turns
from nestgen.denoiser.config import SIZES, denoiser_config
from nestgen.denoiser.flops import count
from nestgen.denoiser.uvit import initial_denoiser
from nestgen.diffusion.process import betas, level_process
from nestgen.recipe.recipe import Recipe
from nestgen.training.batches import Batch
from nestgen.training.progress import peak_of
from nestgen.training.step import Trainer

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
COCO = ["32x32x4", "8x8x64", "6x6x56", "4x4x48", "2x2x40"]


def recipe_of(size: str, precision: str, depth: int, batch: int, compiled: bool = False) -> Recipe:
    """COCO's hierarchy, cut to a depth."""
    data: dict[str, Any] = {
        "name": "benchmark",
        "features": {"out": "stores", "z0": "vae:256"},
        "levels": [{"shape": shape} for shape in COCO[:depth]],
        "denoiser": {"size": size},
        "training": {"precision": precision, "batch": batch, "compile": compiled},
    }
    return Recipe.model_validate(data)


def trainer_of(recipe: Recipe, level: int, accelerator: Accelerator) -> tuple[Trainer, Batch]:
    """A trainer without a store, and a batch of noise."""
    config, batch = denoiser_config(recipe, level), recipe.training.batch

    def noise(shape: tuple[int, int, int]) -> torch.Tensor:
        return torch.randn(batch, *shape).permute(0, 3, 1, 2)  # in memory as batches are

    conditions = tuple(noise(shape) for shape in config.condition_shapes)
    keep_B = torch.rand(batch) < 0.5 if conditions else None
    process = level_process(recipe, level)
    at = process.at(torch.rand(batch, dtype=torch.float64))
    trainer = Trainer(accelerator, initial_denoiser(recipe, level), process, recipe.training)
    samples = Batch(noise(config.shape), noise(config.shape), at, conditions, keep_B=keep_B)
    return trainer, samples.to(accelerator.device)


@click.command()
@click.option("--size", type=click.Choice(list(SIZES)), default="small", show_default=True)
@click.option("--batch", default=2, show_default=True)
@click.option("--steps", default=1, show_default=True, help="A round.")
@click.option("--precision", type=click.Choice(["no", "bf16", "fp16"]), default="no", show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Ours compiled, as training.compile does.")
@rounds_option
@out_option
def main(size: str, batch: int, steps: int, precision: str, compiled: bool, rounds: int, out: Path | None) -> None:
    """Steps of z_0 (COCO's 32x32x4): plain U-ViT, ours, and ours given z_1; then every level of the hierarchy."""
    accelerator = Accelerator(mixed_precision=precision)
    device = accelerator.device
    dim, depth, heads = SIZES[size]
    plain = PlainTraining(PlainUViT(32, 4, 2, dim, depth, heads), betas(), device, HALVES.get(precision))
    z = torch.randn(batch, 4, 32, 32, device=device)
    alone, hierarchy = (recipe_of(size, precision, levels, batch, compiled) for levels in (1, 2))
    ours, given = (trainer_of(recipe, 0, accelerator) for recipe in (alone, hierarchy))

    def run(step: Any, *arguments: Any) -> None:
        for _ in range(steps):
            step(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize()

    contenders = {
        "plain U-ViT": lambda turn: run(plain.step, z),
        "nestgen, z_0 alone": lambda turn: run(ours[0].step, ours[1], 10_000),
        "nestgen, z_0 given z_1": lambda turn: run(given[0].step, given[1], 10_000),
    }
    for contender in contenders.values():
        contender(0)  # the first step allocates
    measured = take_turns(contenders, rounds)
    flops = [count(denoiser_config(recipe, 0)).gflops_true for recipe in (alone, alone, hierarchy)]
    lines, peak = [], peak_of(device, precision)
    on_gpu = device.type == "cuda"
    clock = "s on the clock" if on_gpu else "s of processor time"
    took = {name: (one.wall if on_gpu else one.cpu) / steps for name, one in measured.items()}
    for (name, one), gflops in zip(measured.items(), flops):
        seconds = took[name]
        speed = 3e9 * gflops * batch / seconds
        lines.append(
            [
                name,
                f"{seconds:.4f}",
                f"{gflops:.1f}",
                f"{speed / 1e9:.0f}" + (f" ({speed / peak:.0%} of the peak)" if peak else ""),
                ratio(took["plain U-ViT"], seconds),
                f"{one.spread:.0%}",
            ]
        )
    first, second = (took[name] for name in list(contenders)[1:])
    path = (second / first - 1) / (flops[2] / flops[1] - 1)
    body = table(["step", clock, "GFlops a sample", "GFLOP/s", "plain / it", "spread"], lines)
    body += f"\n\nThe condition path costs {second / first:.2f} times the step; by its GFlops {flops[2] / flops[1]:.2f}"
    body += f" ({path:.2f} of what they say it adds)."
    where = torch.cuda.get_device_name(device) if on_gpu else "cpu"
    if on_gpu:
        body += f" At most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB were in use."
    title = (
        f"A training step of {size}, batch {batch}, precision {precision}{', compiled' if compiled else ''}, on {where}"
    )
    report(title, body, ["torch", "accelerate"], out)


if __name__ == "__main__":
    main()
