"""Peak memory of the commands that read all images, with ten times as many images.

python -m benchmarks.memory --out build/memory.md
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import click
import psutil
import timm
import torch
from safetensors.torch import save_file

from benchmarks.photos import write_shards
from benchmarks.side_by_side import out_option, report, table

MODEL = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": 64, "patch_size": 8, "depth": 2, "embed_dim": 96, "num_heads": 3}  # quick: memory is measured


@click.command()
@click.option("--pictures", default=1500, show_default=True, help="The smaller number.")
@click.option("--times", default=10, show_default=True, help="How many times as many the larger is.")
@click.option("--workers", default=1, show_default=True, help="Dask workers of the extraction.")
@out_option
def main(pictures: int, times: int, workers: int, out: Path | None) -> None:
    """Memory of its own (resident less shared) that each command and its workers hold together at the most."""
    lines = []
    with tempfile.TemporaryDirectory(prefix="memory-") as name:
        folder = Path(name)
        weights = _weights(folder)
        write_shards(folder / "shards", times * pictures, (96, 80), shard=4096)
        peaks: dict[tuple[str, int], float] = {}
        for count in (pictures, times * pictures):
            root = folder / f"stores-{count}"
            common = ("--encoder", f"timm:{MODEL}", "--weights", weights)
            extract = (
                "extract", f"wds:{folder}/shards/*.tar", "--out", root, "--limit", count, "--levels", "6x6x56,2x2x40",
                "--z0", "pixels:64", "--workers", workers, *common,
            )  # fmt: skip
            knn_viz = ("knn-viz", "--stores", root, "--rows", "all", "--out", folder / "knn.png", *common)
            for command in (extract, knn_viz):
                peaks[command[0], count] = peak_memory([sys.executable, "-m", "featurize", *map(str, command)])
                click.echo(f"{command[0]} of {count:,}: {peaks[command[0], count]:,.0f} MiB", err=True)
    for command in ("extract", "knn-viz"):
        small, large = peaks[command, pictures], peaks[command, times * pictures]
        lines.append((f"featurize {command}", f"{small:,.0f}", f"{large:,.0f}", f"{large / small:.2f}x"))
    head = ("command", f"MiB with {pictures:,} pictures", f"with {times * pictures:,}", "grew by")
    body = (
        f"Peak memory of a command and its {workers} worker(s), resident less shared, sampled; a small ViT, "
        f"JPEGs of 96x80, two levels and z_0 pixels:64; knn-viz compares all rows.\n\n{table(head, lines)}\n\nTarget: flat."
    )
    report("Peak memory when the input grows tenfold", body, ("torch", "dask", "zarr", "faiss-cpu"), out)


def peak_memory(command: list[str]) -> float:
    """MiB that a command and its descendants have of their own at the same time, at the most."""
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = 0.0
    while process.poll() is None:
        total = 0
        for one in [process, *_descendants(process)]:
            with suppress(psutil.NoSuchProcess):
                memory = one.memory_info()
                total += memory.rss - memory.shared
        peak = max(peak, total / 2**20)
        time.sleep(0.05)
    if process.returncode:
        assert process.stderr is not None
        raise click.ClickException(f"{' '.join(command)} failed: {process.stderr.read()[-2000:]}")
    return peak


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def _weights(folder: Path) -> Path:
    torch.manual_seed(0)
    path = folder / "vit.safetensors"
    save_file(timm.create_model(MODEL, num_classes=0, **MODEL_ARGS).state_dict(), path)
    path.with_suffix(".json").write_text(json.dumps({"model": MODEL, "model_args": MODEL_ARGS}))
    return path


if __name__ == "__main__":
    main()
