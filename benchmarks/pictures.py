"""Hierarchies of one, two and three levels in pixels, trained for the same steps of z_0: scores, and a sheet to look at.

    python -m benchmarks.pictures --side 64 --size small --steps 10000 --photos ../shared/data --out DIR/pictures.md

Photos are the shards `imagenette64` of the folder that --photos names, through its small ViT; without the folder, scenes
are drawn. Next to the table stands `pictures/`, with stores, runs, samples and `sheet.png`: a row for each depth, the
same seeds in each. What is there already is not made again. None of the photos is in the sheet.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from PIL import Image

from benchmarks.levers import RECIPES, merged
from benchmarks.side_by_side import command, out_option, report, table
from nestgen.denoiser.config import SIZES
from nestgen.files import read_json
from nestgen.recipe.locations import run_dir
from nestgen.recipe.recipe import load_recipe
from nestgen.recipe.yaml import read_yaml
from nestgen.runs.loss_log import training_seconds

ROW = 16  # samples of a row of the sheet


def recipe(side: int, size: str, steps: int, batch: int, count: int, limit: int | None, photos: Path) -> dict[str, Any]:
    """The recipe `photos` with another side, size and length; of drawn scenes where there are no photos."""
    document: Any = read_yaml(RECIPES / "photos.yaml")
    if photos.is_dir():
        shards, weights = document["features"]["source"], document["features"]["weights"]
        features = {"source": shards.replace("data/", f"{photos}/"), "weights": weights.replace("data/", f"{photos}/")}
    else:
        features = {"source": f"scenes:{side}", "encoder": "tiny", "weights": None}
    changes = {
        "features": features
        | {"out": "stores/train", "z0": f"pixels:{side}", "limit": limit, "basis_rows": min(4096, limit or 4096)},
        "denoiser": {"size": size},
        "training": {
            "steps": steps,
            "batch": batch,
            "lr": 1e-3 if SIZES[size][0] <= 256 else 3e-4,
            "warmup": min(200, steps // 10),
            "ema": 0.999 if steps >= 3000 else 0.99,
            "checkpoint_every": max(1, steps // 10),
        },
        "evaluation": {"count": count, "reference": "stores/val"},
        "grid": None,
    }
    document = merged(document, changes)
    document["levels"][0]["shape"] = f"{side}x{side}x3"
    return document


def extract(folder: Path, photos: Path, limit: int) -> None:
    """The stores of training and held-out images, with the level of the scores."""
    levels = ("--levels", "4x4x16,2x2x16,1x1x64")
    held_out = [f"wds:{photos}/imagenette64/val-{{000000..000003}}.tar"] if photos.is_dir() else ["--split", "val"]
    command(folder, "featurize", "extract", *levels)
    limits = ("--limit", str(limit)) if limit else ()
    command(
        folder, "featurize", "extract", *held_out, *levels, *limits, "--out", "stores/val", "--basis", "stores/train"
    )


def hierarchy(folder: Path, depth: int, count: int) -> list[object]:
    """Trains, samples and scores one depth; its line of the table."""
    depths = ("--depth", str(depth))
    for level in reversed(range(depth)):
        command(folder, "nestgen", "train", *depths, "--level", str(level))
    samples, store = f"L{depth}", f"L{depth}-store"
    sampling = command(folder, "nestgen", "sample", *depths, "--count", str(count), "--out", samples)
    basis = ("--basis", "stores/train", "--levels", "1x1x64", "--views", "1", "--workers", "0")
    command(folder, "featurize", "extract", f"folder:{samples}", "--out", store, *basis)
    command(folder, "nestgen", "evaluate", "--samples", samples, "--samples-store", store)
    scores = read_json(folder / samples / "evaluation.json")["scores"]
    found = {"z_0" if one["space"] == "z_0" else "encoder": one for one in scores}
    return [
        f"L = {depth}",
        f"{seconds_of_training(folder, depth):.0f}",
        f"{count / sampling:.1f}",
        *(f"{found[space]['frechet_distance']:.3g}" for space in ("encoder", "z_0")),
        *(f"{found['encoder'][name]:.2f}" for name in ("precision", "coverage")),
        *(f"{found[space]['floor']['frechet_distance']:.3g}" for space in ("encoder", "z_0")),
    ]


def seconds_of_training(folder: Path, depth: int) -> float:
    """Of all denoisers of a depth, z_0's of L = 3 too, which is that of L = 2; the same after an interruption."""
    recipe = load_recipe(folder / "nested.yaml").depth(depth)
    logs = (run_dir(recipe, level) / "log.jsonl" for level in range(depth))
    return sum(training_seconds(log, recipe.training.batch) for log in logs)


def write_sheet(folder: Path, depths: Sequence[int], count: int, side: int) -> Path:
    """The first samples of each depth, a row each, twice as large."""
    shown = min(ROW, count)
    sheet = Image.new("RGB", (shown * (2 * side + 2), len(depths) * (2 * side + 2)), "white")
    for row, depth in enumerate(depths):
        for column in range(shown):
            with Image.open(folder / f"L{depth}" / f"{column:06d}.png") as image:
                large = image.resize((2 * side, 2 * side), Image.Resampling.BICUBIC)
            sheet.paste(large, (column * (2 * side + 2), row * (2 * side + 2)))
    sheet.save(folder / "sheet.png")
    return folder / "sheet.png"


@click.command()
@click.option("--side", default=32, show_default=True, help="Pixels.")
@click.option("--size", type=click.Choice(list(SIZES)), default="nano", show_default=True)
@click.option("--steps", default=3000, show_default=True, help="Of every level.")
@click.option("--depth", "depths", multiple=True, type=click.IntRange(1, 3), default=(1, 2, 3), show_default=True)
@click.option("--batch", default=128, show_default=True)
@click.option("--count", default=1000, show_default=True, help="Samples of each depth.")
@click.option("--limit", default=0, help="Images to train on and to hold out; all by default.")
@click.option("--photos", type=click.Path(path_type=Path), default=Path("../shared/data"), show_default=True)
@out_option
def main(
    side: int,
    size: str,
    steps: int,
    depths: tuple[int, ...],
    batch: int,
    count: int,
    limit: int,
    photos: Path,
    out: Path | None,
) -> None:
    """Extract, train, sample and score; print the table."""
    photos = photos.resolve()
    folder = (out or Path("build/pictures.md")).resolve().with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    images = limit or (None if photos.is_dir() else 10_000)
    (folder / "nested.yaml").write_text(json.dumps(recipe(side, size, steps, batch, count, images, photos)))
    extract(folder, photos, limit or (0 if photos.is_dir() else 2000))
    lines = [hierarchy(folder, depth, count) for depth in depths]
    sheet = write_sheet(folder, depths, count, side)
    head = ["", "s of training", "images/s", "encoder", "z_0", "precision", "coverage", "real: encoder", "real: z_0"]
    what = "photos" if photos.is_dir() else "drawn scenes"
    body = (
        f"{what} of {side} px in pixels, {size}, {steps} steps of {batch} a level, {count} samples; Fréchet distances in the "
        f"encoder's features and in z_0.\n\n{table(head, lines)}\n\nLook at {sheet}."
    )
    report("Pictures", body, ("torch", "numpy"), out)


if __name__ == "__main__":
    main()
