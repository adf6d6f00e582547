"""How good samples of scenes are: Fréchet distances, precision, coverage, copies, and how sure real neighbours are of the class.

    cd FOLDER && python -m benchmarks.scene_quality --recipe scenes.yaml --out quality --depth 1 --depth 3 --count 1000

Runs `nestgen sample`, `featurize extract`, `nestgen evaluate` and `nestgen nearest` for each depth, and one card of all
(`quality.json`) with a line for each depth and one for as many held-out real scenes. A class is sure if 15 of the 20 training
scenes nearest in the encoder's 1x1x64 level (by cosine) have it. z_0's distance is also given without the bias of few samples
(unbiased.py). Samples that are there are not made again; those of another count or
setting need another folder.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.side_by_side import table
from benchmarks.unbiased import without_bias
from nestgen.files import read_json, write_json
from nestgen.recipe.locations import named_store_path, store_root
from nestgen.recipe.recipe import Recipe, load_recipe
from nestgen.sampling.card import read_card
from nestgen.sampling.real import reference_root
from nestgen.scoring.spaces import level_space
from nestgen.stores.store import open_store

LEVEL = (1, 1, 64)
NEIGHBOURS, SURE = 20, 15


def votes(query_ND: np.ndarray, real_MD: np.ndarray, label_M: np.ndarray) -> np.ndarray:
    """(N, classes): how many of the nearest real rows, by cosine, have each class."""
    query_ND, real_MD = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query_ND, real_MD))
    nearest_NK = np.argpartition(-query_ND @ real_MD.T, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
    return np.stack([np.bincount(row, minlength=label_M.max() + 1) for row in label_M[nearest_NK]])


def features(root: Path, encoder: str) -> np.ndarray:
    """The encoder's level (N, D) of the unflipped images of a store root."""
    return open_store(named_store_path(root, encoder, LEVEL)).load()[:, 0].reshape(-1, LEVEL[-1]).astype(np.float32)


def run(program: str, *arguments: str) -> None:
    """One command of this environment; its output goes on to ours."""
    if code := subprocess.run([str(Path(sys.executable).with_name(program)), *arguments]).returncode:
        sys.exit(code)  # it has said why


def score(recipe: Recipe, file: Path, out: Path, depth: int, count: int, options: Sequence[str]) -> dict[str, Any]:
    """Samples one depth and scores it; a line of the card."""
    samples, encoded = out / f"L{depth}", out / f"L{depth}-store"
    held_out = str(recipe.root / (recipe.evaluation.reference or ""))
    common = ("--recipe", str(file))
    copies = out / f"L{depth}-nearest.png"
    run("nestgen", "sample", *common, "--depth", str(depth), "--count", str(count), "--out", str(samples), *options)
    basis = ("--basis", str(store_root(recipe)), "--levels", "x".join(map(str, LEVEL)))
    run("featurize", "extract", f"folder:{samples}", *common, "--out", str(encoded), *basis, "--workers", "0")
    run("nestgen", "evaluate", *common, "--samples", str(samples), "--samples-store", str(encoded))
    run("nestgen", "nearest", *common, "--samples", str(samples), "--reference", held_out, "--out", str(copies))
    scores = {one["space"]: one for one in read_json(samples / "evaluation.json")["scores"]}
    nearest = read_json(copies.with_suffix(".json"))["levels"]
    of_encoder = next(one for space, one in scores.items() if space.startswith(recipe.features.encoder))
    return {
        "samples": f"L = {depth}",
        "features": of_encoder["frechet_distance"],
        "z_0": scores["z_0"]["frechet_distance"],
        "z_0 without bias": z_0_without_bias(recipe, samples),
        **{key: of_encoder[key] for key in ("precision", "recall", "density", "coverage")},
        "sure": sure(recipe, features(encoded, recipe.features.encoder)),
        "nearer than held-out": next(one["nearer_than_held_out"] for one in nearest if one["level"] == 0),
        "floor": {
            "features": of_encoder["floor"]["frechet_distance"],
            "z_0": scores["z_0"]["floor"]["frechet_distance"],
        },
    }


def z_0_without_bias(recipe: Recipe, samples: Path) -> float | None:
    """The distance of infinitely many samples in the space in which z_0 is scored."""
    card = read_card(recipe, samples)
    space = level_space(recipe.depth(card["depth"]), 0, reference_root(recipe, None), card, samples)
    real_MD = space.reference().vectors_MD
    assert real_MD is not None
    return without_bias(space.samples_ND, real_MD)


def sure(recipe: Recipe, query_ND: np.ndarray) -> float:
    """Share of images of whose class the nearest training scenes are sure."""
    root = store_root(recipe)
    labels = open_store(root / "labels.zarr").load()
    return float((votes(query_ND, features(root, recipe.features.encoder), labels).max(axis=1) >= SURE).mean())


@click.command()
@click.option("--recipe", "file", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--depth", "depths", type=int, multiple=True, default=(1, 3))
@click.option("--count", type=int, default=1000)
@click.option("--set", "settings", multiple=True, help="As of `nestgen sample`.")
def main(file: Path, out: Path, depths: tuple[int, ...], count: int, settings: tuple[str, ...]) -> None:
    recipe = load_recipe(file)
    options = [word for setting in settings for word in ("--set", setting)]
    lines = [score(recipe, file, out, depth, count, options) for depth in depths]
    held_out = features(recipe.root / (recipe.evaluation.reference or ""), recipe.features.encoder)
    real = {"samples": "real, held out", **lines[0]["floor"], "sure": sure(recipe, held_out[:count])}
    write_json(out / "quality.json", {"count": count, "settings": settings, "lines": [*lines, real]})
    heads = [key for key in lines[0] if key != "floor"]
    print(table(heads, [[cell(line.get(key)) for key in heads] for line in [*lines, real]]))


def cell(value: Any) -> str:
    """A value as the table shows it."""
    return "" if value is None else value if isinstance(value, str) else f"{value:.3g}"


if __name__ == "__main__":
    main()
