"""Where the time of a training step goes: a profiler's table of its kernels."""

from __future__ import annotations

from pathlib import Path

import click
import torch
from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile

from benchmarks.side_by_side import out_option, report
from benchmarks.train_step import recipe_of, trainer_of
from nestgen.denoiser.config import SIZES

WARM, MEASURED, ROWS = 3, 5, 25


@click.command()
@click.option("--size", type=click.Choice(list(SIZES)), default="small", show_default=True)
@click.option("--batch", default=2, show_default=True)
@out_option
def main(size: str, batch: int, out: Path | None) -> None:
    """Steps of z_0 given z_1 (COCO's), in bfloat16 and compiled on a GPU, as they are on a CPU."""
    on_gpu = torch.cuda.is_available()
    precision = "bf16" if on_gpu else "no"
    accelerator = Accelerator(mixed_precision=precision)
    trainer, samples = trainer_of(recipe_of(size, precision, 2, batch, compiled=on_gpu), 0, accelerator)

    def run(steps: int) -> None:
        for _ in range(steps):
            trainer.step(samples, 10_000)
        if on_gpu:
            torch.cuda.synchronize()

    run(WARM)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as measured:
        run(MEASURED)
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    body = f"```text\n{measured.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=60)}\n```"
    where = torch.cuda.get_device_name() if on_gpu else "cpu"
    report(f"{MEASURED} steps of {size}, batch {batch}, precision {precision}, on {where}", body, ["torch"], out)


if __name__ == "__main__":
    main()
