"""Two processes against one on the same machine, each with one thread: `nestgen train` as it is."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import numpy as np
import psutil

from benchmarks.side_by_side import out_option, report, table
from benchmarks.training_feed import write_store


def rate(recipe: Path, processes: int) -> float:
    """Samples a second, the median of the log's intervals but the first."""
    name = f"{processes}-{len(list(recipe.parent.glob('run-*')))}"
    own = recipe.with_name(f"run-{name}.yaml")
    own.write_text(json.dumps({**json.loads(recipe.read_text()), "name": name}))
    command = [sys.executable, "-m", "nestgen", "train", "--level=0", f"--processes={processes}", f"--recipe={own}"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    log = (recipe.parent / "runs" / name / "z0-top/log.jsonl").read_text().splitlines()
    return statistics.median(json.loads(line)["samples_per_second"] for line in log[1:])


@click.command()
@click.option("--size", default="micro", show_default=True)
@click.option("--batch", default=32, show_default=True)
@click.option("--steps", default=50, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@out_option
def main(size: str, batch: int, steps: int, rounds: int, out: Path | None) -> None:
    """The global batch is the same; perfect scaling is 2."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "nested.yaml"
        codec = {"name": "pixels", "size": 16, "moments": False, "scale": 1.0}
        values = np.random.default_rng(0).standard_normal((512, 1, 16, 16, 3), np.float32)
        write_store(Path(folder) / "stores/pixels/16x16x3.zarr", values, 256, latent_shape=[16, 16, 3], codec=codec)
        recipe.write_text(
            json.dumps(
                {
                    "features": {"out": "stores", "z0": "pixels:16"},
                    "levels": [{"shape": "16x16x3"}],
                    "denoiser": {"size": size},
                    "training": {"batch": batch, "steps": steps, "preview": 0},
                }
            )
        )
        rates = {processes: [] for processes in (1, 2)}
        for _ in range(rounds):
            for processes, found in rates.items():
                found.append(rate(recipe, processes))
    one, two = (statistics.median(found) for found in rates.values())
    lines = [["1", f"{one:.1f}", ""], ["2", f"{two:.1f}", f"{two / one:.2f} ({two / one / 2:.0%} of perfect)"]]
    body = table(["processes", "samples/s", "scaling"], lines)
    body += f"\n\n{psutil.cpu_count(logical=False)} physical cores."
    report(f"Processes: {size}, batch {batch}", body, ["torch", "accelerate"], out)


if __name__ == "__main__":
    main()
