"""A training that stops at half its steps and goes on, against one that runs through: how far apart are their weights?

With --compile each part compiles anew, as on another machine.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file

from benchmarks.side_by_side import command, out_option, report, table
from nestgen.denoiser.config import SIZES

IMAGES = 256


def write_recipe(folder: Path, size: str, steps: int, compiled: bool) -> None:
    """A recipe of drawn scenes in the folder; `nested.yaml` is JSON, which is YAML."""
    recipe: dict[str, Any] = {
        "name": "resume",
        "features": {"source": "scenes:32", "out": "stores", "encoder": "tiny", "z0": "vae:32", "limit": IMAGES},
        "levels": [{"shape": "8x8x8"}, {"shape": "2x2x32", "sigma": 0.5}],
        "denoiser": {"size": size},
        "training": {
            "steps": steps,
            "batch": 32,
            "warmup": 2,
            "checkpoint_every": steps,
            "preview": 0,
            "precision": "auto",
            "compile": compiled or None,
        },
    }
    recipe["features"]["z0_weights"] = "tiny"
    (folder / "nested.yaml").write_text(json.dumps(recipe))


def train(folder: Path, size: str, steps: int, compiled: bool) -> float:
    """Train z_0's denoiser to so many steps; the seconds."""
    write_recipe(folder, size, steps, compiled)
    anew = {"TORCHINDUCTOR_CACHE_DIR": str(folder / f"compiled-{steps}")} if compiled else {}
    return command(folder, "nestgen", "train", "--level", "0", **anew)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The averaged weights of the newest checkpoint."""
    checkpoints = (folder / "runs/resume").glob("*/checkpoints/*/ema.safetensors")
    return load_file(max(checkpoints, key=lambda file: int(file.parent.name)))


@click.command()
@click.option("--steps", default=20, show_default=True)
@click.option("--size", type=click.Choice(list(SIZES)), default="nano", show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="On a CPU too.")
@out_option
def main(steps: int, size: str, compiled: bool, out: Path | None) -> None:
    """Train through, and in two halves; compare the averaged weights."""
    with tempfile.TemporaryDirectory() as root:
        through, halves = Path(root, "through"), Path(root, "halves")
        for folder in (through, halves):
            folder.mkdir()
        write_recipe(through, size, steps, compiled)
        command(through, "featurize", "extract", "--workers", "0")
        (halves / "stores").symlink_to(through / "stores")
        seconds = train(through, size, steps, compiled)
        in_halves = sum(train(halves, size, end, compiled) for end in (steps // 2, steps))
        first, second = weights(through), weights(halves)
    apart = max(float((first[name].double() - second[name].double()).abs().max()) for name in first)
    largest = max(float(weight.abs().max()) for weight in first.values())
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    lines = [["through", f"{seconds:.1f}", ""], ["in two halves", f"{in_halves:.1f}", f"{apart:.3g} of {largest:.3g}"]]
    body = table(["training", "s, start included", "largest difference of a weight"], lines)
    how = ", compiled" if compiled else ""
    report(f"Resuming: {steps} steps of {size}{how}, on {where}", body, ["torch"], out)


if __name__ == "__main__":
    main()
