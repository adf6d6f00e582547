"""What only a GPU can show, in order of worth and within a time: each stage a command of its own that is skipped once it is done.

On a machine without a GPU the same stages run tiny, which shows that they would run.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click
import torch

LEAST = 20.0  # seconds: a stage that has less left is not begun


@dataclass(frozen=True)
class Stage:
    """A module of benchmarks with its options on a GPU and, in place of those, without one."""

    name: str
    shows: str
    module: str
    options: str
    tiny: str

    def command(self, on_gpu: bool, out: Path) -> list[str]:
        """The command; its table goes to `out`."""
        options = (self.options if on_gpu else self.tiny).split()
        return [sys.executable, "-m", f"benchmarks.{self.module}", *options, "--out", str(out)]


NANO = "--size nano --batch 1 --rounds 1"
EXTRACTION = "--pictures 8192 --workers 1 --rounds 2"  # of a GPU's one worker, which the other cores decode for
TINY_EXTRACTION = "--pictures 8 --model test_vit --levels 2x2x8 --decoders 1 --rounds 1"
STAGES = (
    Stage(
        "step-small",
        "share of the peak of a small step",
        "train_step",
        "--size small --batch 256 --steps 10 --precision bf16 --compile",
        NANO,
    ),
    Stage("extract-vit", "extraction against the bare forward pass", "extraction", EXTRACTION, TINY_EXTRACTION),
    Stage(
        "extract-vit-bf16",
        "the same in bfloat16",
        "extraction",
        f"{EXTRACTION} --precision bfloat16",
        TINY_EXTRACTION,
    ),
    Stage(
        "extract-vit-nvjpeg",
        "the same, JPEGs decoded by the GPU",
        "extraction",
        f"{EXTRACTION} --precision bfloat16 --decoder nvjpeg",
        TINY_EXTRACTION,
    ),
    Stage(
        "extract-vae",
        "the paper's own z_0, vae:256, beside the ViT, both in bfloat16",
        "extraction",
        "--pictures 4096 --workers 1 --rounds 1 --precision bfloat16 --z0 vae:256 --z0-precision bfloat16",
        f"{TINY_EXTRACTION} --z0 vae:32 --z0-weights tiny --z0-precision bfloat16",
    ),
    Stage(
        "precision",
        "errors of bfloat16, and of the GPU, against float32 on the processor",
        "precision",
        "--pictures 16",  # the processor computes them too, with one thread
        "--pictures 2 --model test_vit --batch 2",
    ),
    Stage("resume", "a training that goes on from a checkpoint", "resume", "--steps 200 --size small", "--steps 4"),
    Stage(
        "sample-small",
        "images a second, and what five levels cost",
        "sample",
        "--size small --depth 5 --batch 64 --steps 50 --precision bf16 --rounds 2",
        f"{NANO} --steps 1 --depth 2",
    ),
    Stage(
        "profile-small",
        "where a small step's time goes",
        "profile_step",
        "--size small --batch 256",
        "--size nano --batch 1",
    ),
    Stage(
        "step-medium",
        "share of the peak of a medium step",
        "train_step",
        "--size medium --batch 128 --steps 5 --precision bf16 --compile",
        NANO,
    ),
    Stage(
        "step-large",
        "share of the peak of a large step",
        "train_step",
        "--size large --batch 64 --steps 5 --precision bf16 --compile",
        NANO,
    ),
    Stage(
        "pictures",
        "what hierarchies of one, two and three levels draw after twenty minutes",
        "pictures",
        "--side 64 --size small --steps 3000 --batch 256",
        "--side 16 --steps 2 --batch 4 --limit 24 --count 16 --depth 1 --photos none",
    ),
)
NAMES = [stage.name for stage in STAGES]


@click.command()
@click.option("--minutes", default=25.0, show_default=True, help="For all stages together.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the tables.")
@click.option("--only", type=click.Choice(NAMES), multiple=True, help="These stages alone.")
@click.option("--skip", type=click.Choice(NAMES), multiple=True, help="Not these stages.")
def main(minutes: float, out: Path, only: tuple[str, ...], skip: tuple[str, ...]) -> None:
    """Run the stages that are not done yet: OUT/STAGE.md is a stage's table, STAGE.json how it ended, STAGE.log what it printed.

    A stage that the time ends, or that fails, is run again by the next call. Exits with 1 where one failed.
    """
    on_gpu = torch.cuda.is_available()
    end = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    click.echo(torch.cuda.get_device_name() if on_gpu else "No GPU is here: the stages run tiny, and measure nothing.")
    failed = False
    for stage in STAGES:
        if (only and stage.name not in only) or stage.name in skip:
            continue
        state = how_it_ends(stage, out, on_gpu, end)
        failed |= state == "failed"
        click.echo(f"{stage.name}: {state} ({stage.shows})")
    sys.exit(1 if failed else 0)


def how_it_ends(stage: Stage, out: Path, on_gpu: bool, end: float) -> str:
    """Run a stage unless it is done, until the time `end`: "done", "failed" or "out of time"."""
    record = out / f"{stage.name}.json"
    before = json.loads(record.read_text()) if record.is_file() else {}
    if (before.get("state"), before.get("gpu")) == ("done", on_gpu):
        return "done before"
    left = end - time.monotonic()
    if left < LEAST:
        return "out of time"
    command, began = stage.command(on_gpu, out / f"{stage.name}.md"), time.monotonic()
    with (out / f"{stage.name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            state = "failed" if process.wait(left) else "done"
        except subprocess.TimeoutExpired:
            state = "out of time"
            stop(process)
    record.write_text(
        json.dumps(
            {"state": state, "gpu": on_gpu, "seconds": round(time.monotonic() - began, 1), "command": command[1:]},
            indent=1,
        )
        + "\n"
    )
    return state


def stop(process: subprocess.Popen[bytes], seconds: float = 10) -> None:
    """End a stage, gently at first."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
