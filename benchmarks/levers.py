"""What each lever of a recipe is worth at equal processor time: the same seconds of training, then Fréchet distances.

    python -m benchmarks.levers scenes --arm today --arm decay --depth 1 --seed 0 --seconds 120 --out levers

One JSON a run in OUT/DATA, that is not made again; a run that was killed goes on from its last checkpoint. Without --arm,
all of them; the table of what is there is printed at the end. Stores are extracted once for each codec, to OUT/DATA-stores/CODEC:
for photos link or copy the folder `data` that their recipe names to OUT/photos-stores/pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from accelerate import Accelerator

from benchmarks.lever_arms import PLAIN, arms_of
from benchmarks.side_by_side import processor, table
from benchmarks.unbiased import without_bias
from nestgen.denoiser.uvit import initial_denoiser
from nestgen.diffusion.process import level_process
from nestgen.files import read_json, write_json
from nestgen.recipe.locations import named_store_path, run_dir
from nestgen.recipe.recipe import Recipe, load_recipe
from nestgen.recipe.yaml import read_yaml
from nestgen.runs.loss_log import read as read_log
from nestgen.sampling.conditions import Request
from nestgen.sampling.sample import sample
from nestgen.scoring.evaluate import References, evaluate
from nestgen.scoring.frechet import frechet_distance
from nestgen.stores.store import open_store
from nestgen.training.accelerator import bfloat16_is_faster
from nestgen.training.batches import make_batch, open_training_data
from nestgen.training.step import Trainer
from nestgen.training.train import train

RECIPES = Path(__file__).parents[1] / "pipelines" / "recipes"
DATA = {"scenes": "mini.yaml", "photos": "mini-photos.yaml"}
SHARES = {1: (1.0,), 2: (0.75, 0.25), 3: (0.6, 0.27, 0.13)}  # of the processor time, z_0 first
REFERENCE = 2000  # held-out scenes; of photos all
AGAIN = "decoded and encoded again"
UNBIASED = f"{AGAIN}, without bias"
SPACE = "1x1x64"  # of the encoder, where they are compared
COSTLY = ("batch", "side_loss", "align", "muon")  # what of a training decides the cost of its step
ROUNDS, STEPS = 5, 20  # that are timed, and steps of each


def merged(document: Any, change: Any) -> Any:
    """A document with the keys of another; a mapping changes each item of a list, or those whose numbers it has as keys."""
    if isinstance(document, dict) and isinstance(change, dict):
        return document | {key: merged(document.get(key), value) for key, value in change.items()}
    if isinstance(document, list) and isinstance(change, dict):
        own = all(isinstance(key, int) for key in change)
        return [merged(item, change.get(number, {}) if own else change) for number, item in enumerate(document)]
    return change


def codec_of(document: dict[str, Any]) -> str:
    """The weights of z_0's codec, which name a folder of stores."""
    return document["features"].get("z0_weights") or "pixels"


def changed(data: str, changes: Iterable[dict[str, Any]]) -> Any:
    """The recipe of scenes or photos as it was, with an arm's changes."""
    document: Any = read_yaml(RECIPES / DATA[data])
    for change in (PLAIN[data], *changes):
        document = merged(document, change)
    return document


def extract_stores(data: str, changes: Iterable[dict[str, Any]], all_stores: Path, scenes: int) -> None:
    """The training and held-out stores of an arm; what is there already is kept, and goes on where it was killed."""
    document = changed(data, changes)
    document["features"] |= {"out": "train"} | ({"limit": scenes, "basis_rows": 4096} if data == "scenes" else {})
    stores = all_stores / codec_of(document)
    if (stores / "val" / "labels.seal.json").is_file():
        limit = read_json(stores / "nested.yaml")["features"].get("limit")
        if limit != document["features"].get("limit"):
            raise click.ClickException(f"{stores} holds {limit} scenes, not {scenes}; give another --stores")
        return
    file = recipe_at(stores, document).file
    shapes = ",".join([*(level["shape"] for level in document["levels"][1:3]), SPACE])
    held_out = document["grid"].get("held_out")
    which = [held_out] if held_out else ["--split", "val", "--limit", str(REFERENCE)]
    reference = ["--out", str(stores / "val"), "--basis", str(stores / "train")]
    for arguments in ([], [*which, *reference]):
        featurize("extract", *arguments, "--recipe", str(file), "--levels", shapes, "--workers", "0", folder=stores)


def document_of(data: str, all_stores: Path, changes: Iterable[dict[str, Any]], seed: int) -> dict[str, Any]:
    """The recipe of an arm."""
    document = changed(data, changes) | {"seed": seed, "grid": None}
    stores = all_stores / codec_of(document)
    document["features"]["out"] = str(stores / "train")
    document["evaluation"]["reference"] = str(stores / "val")
    if "weights" in document["features"]:
        document["features"]["weights"] = str(stores / document["features"]["weights"])
    return document


def seconds_per_step(plain: dict[str, Any], document: dict[str, Any], level: int, depth: int, folder: Path) -> float:
    """Processor seconds of a training step, kept for all seeds.

    Of the plain recipe's, those of the fastest of some rounds. Of any other, as many times that as it takes in turns with a
    plain one: what else the machine does slows both alike.
    """
    costs_file = folder / "costs.json"
    costs = read_json(costs_file) if costs_file.is_file() else {}

    def key(of: dict[str, Any]) -> str:
        shapes = [(one["shape"], one.get("patch")) for one in of["levels"][:depth]]
        options = {name: value for name in COSTLY if (value := of["training"].get(name)) is not None}
        return json.dumps([level, shapes, of["denoiser"], options])

    def trainer(of: dict[str, Any]) -> Callable[[], float]:
        return rounds_of(recipe_at(folder / "timed" / digest([key(of)]), of).depth(depth), level)

    if key(plain) not in costs:
        one = trainer(plain)
        costs[key(plain)] = min(one() for _ in range(ROUNDS))
    if key(document) not in costs:
        one, other = trainer(plain), trainer(document)
        costs[key(document)] = costs[key(plain)] * statistics.median(other() / one() for _ in range(ROUNDS))
    write_json(costs_file, costs)
    return float(costs[key(document)])


def rounds_of(recipe: Recipe, level: int) -> Callable[[], float]:
    """What trains some steps, that are not kept, and returns the processor seconds of one."""
    data = open_training_data(recipe, level)
    accelerator = Accelerator(mixed_precision="bf16" if bfloat16_is_faster() else "no", cpu=True)
    trainer = Trainer(accelerator, initial_denoiser(recipe, level), level_process(recipe, level), recipe.training)
    batches = [make_batch(data, step) for step in range(STEPS)]

    def train_some() -> float:
        start = time.process_time()
        for step, batch in enumerate(batches):
            trainer.step(batch, step)
        return (time.process_time() - start) / STEPS

    train_some()  # the first is slower
    return train_some


def digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def recipe_at(folder: Path, document: dict[str, Any]) -> Recipe:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nested.yaml").write_text(json.dumps(document, indent=1))  # JSON is YAML too
    return load_recipe(folder / "nested.yaml")


def run(
    data: str,
    arm: str,
    changes: list[dict[str, Any]],
    depth: int,
    seed: int,
    seconds: float,
    count: int,
    stores: Path,
    out: Path,
) -> dict[str, Any]:
    """Trains, samples and scores one hierarchy; what it took and what came of it."""
    folder = out / data
    plain, document = document_of(data, stores, [], seed), document_of(data, stores, changes, seed)
    steps, used, losses = [], [], []
    document = merged(document, {"training": {"checkpoint_every": 2000, "preview": 0}})
    trained = {key: value for key, value in document.items() if key not in ("sampling", "evaluation")}
    place = folder / "runs" / digest([json.dumps([trained, depth, seconds], sort_keys=True)])
    for level in range(depth):
        cost = seconds_per_step(plain, document, level, depth, folder)
        steps.append(int(SHARES[depth][level] * seconds / cost))
        document_l = merged(document, {"training": {"steps": steps[-1], "warmup": min(200, steps[-1] // 10)}})
        recipe = recipe_at(place / f"z{level}", document_l).depth(depth)
        start = time.process_time()
        train(recipe, level)
        used.append(round(time.process_time() - start, 1))
        log = read_log(run_dir(recipe, level) / "log.jsonl")
        losses.append(sum(line["loss"] for line in log[-50:]) / len(log[-50:]))
        gather(run_dir(recipe, level), place / "runs" / document["name"])
    recipe = recipe_at(place, document).depth(depth)
    sampled = place / f"samples-{digest([json.dumps([document['sampling'], count], sort_keys=True)])}"
    start = time.process_time()
    sample(recipe, sampled, Request(count, 0, 100))
    sampling_seconds = time.process_time() - start
    encoded = sampled.with_name(sampled.name + "-encoded")
    file = recipe_at(place / "plain", plain).file
    options = ["--recipe", str(file), "--out", str(encoded), "--basis", plain["features"]["out"], "--workers", "0"]
    featurize("extract", f"folder:{sampled}", *options, "--levels", SPACE, "--views", "1", folder=place)
    evaluate(recipe, sampled, References(samples_store=encoded), sampled.with_suffix(".json"))
    scores = read_json(sampled.with_suffix(".json"))["scores"]
    z0_ND, reference_MD = (plain_z0(plain, root) for root in (encoded, Path(plain["evaluation"]["reference"])))
    again = {AGAIN: frechet_distance(z0_ND, reference_MD), UNBIASED: without_bias(z0_ND, reference_MD)}
    return {
        "data": data, "arm": arm, "changes": changes, "depth": depth, "seed": seed, "seconds": seconds, "count": count,
        "steps": steps, "processor_seconds": used, "sampling_seconds": round(sampling_seconds, 1), "losses": losses,
        "frechet_distances": {score["space"]: score["frechet_distance"] for score in scores} | again,
        "scores": scores, "samples": str(sampled), "processor": processor(),
    }  # fmt: skip


def plain_z0(plain: dict[str, Any], root: Path) -> np.ndarray:
    """z_0 (N, D) of the images of a store root by the plain recipe's codec, its means if it has moments.

    Decoded and encoded again, samples of two codecs are in one space.
    """
    shape = tuple(map(int, plain["levels"][0]["shape"].split("x")))
    store = open_store(named_store_path(root, plain["features"]["z0"].split(":")[0], shape))
    values_NhwC = store.load()[:, 0].astype(np.float32)[..., : shape[-1]]
    return values_NhwC.reshape(len(values_NhwC), -1) * store.attributes["codec"]["scale"]


def gather(run: Path, into: Path) -> None:
    """Links a level's run where the recipe of the hierarchy looks for it."""
    into.mkdir(parents=True, exist_ok=True)
    link = into / run.name
    if not link.is_symlink():
        link.symlink_to(run.resolve())


def featurize(*arguments: str, folder: Path) -> None:
    """Runs the other package's command in a folder; FEATURIZE names another one than this environment's."""
    command = os.environ.get("FEATURIZE", str(Path(sys.executable).parent / "featurize"))
    outcome = subprocess.run([command, *arguments], cwd=folder, stderr=subprocess.PIPE, text=True)
    if outcome.returncode:
        raise click.ClickException(outcome.stderr[-1000:])


def show(results: Path) -> None:
    """The table of all runs of a folder: seeds side by side."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for path in sorted(results.glob("*.json")):
        one = read_json(path)
        if "frechet_distances" in one:
            found.setdefault((one["depth"], one["seconds"], one.get("count", "?"), one["arm"]), []).append(one)
    rows = []
    for (depth, seconds, count, arm), runs in sorted(found.items()):
        spaces = [[_written(one["frechet_distances"].get(name)) for one in runs] for name in _named(runs[0])]
        loss = ", ".join(f"{value:.4f}" for value in runs[0]["losses"])
        rows.append(
            [
                f"L = {depth}",
                f"{seconds:g}",
                str(count),
                arm,
                *(" / ".join(values) for values in spaces),
                loss,
                str(runs[0]["steps"]),
            ]
        )
    print(table(["depth", "seconds", "samples", "arm", "encoder's", "z_0's", AGAIN, UNBIASED, "losses", "steps"], rows))


def _written(distance: float | None) -> str:
    return "" if distance is None else f"{distance:.2f}"


def _named(run: dict[str, Any]) -> list[str]:
    encoder = next(name for name in run["frechet_distances"] if not name.startswith(("z_", AGAIN)))
    return [encoder, "z_0", AGAIN, UNBIASED]


@click.command()
@click.argument("data", type=click.Choice(list(DATA)))
@click.option("--arm", "arms", multiple=True, help="Which; all without it.")
@click.option("--depth", "depths", multiple=True, type=int, default=(1, 3), show_default=True)
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1, 2), show_default=True)
@click.option("--seconds", default=120.0, show_default=True, help="Processor time of all trainings of a hierarchy.")
@click.option("--count", default=500, show_default=True, help="Samples that are scored.")
@click.option("--scenes", default=20_000, show_default=True, help="How many scenes to train on.")
@click.option(
    "--stores",
    type=click.Path(path_type=Path),
    help="A folder for each codec, with train/ and val/.  [default: OUT/DATA-stores]",
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("levers"), show_default=True)
def main(
    data: str,
    arms: tuple[str, ...],
    depths: tuple[int, ...],
    seeds: tuple[int, ...],
    seconds: float,
    count: int,
    scenes: int,
    stores: Path | None,
    out: Path,
) -> None:
    """Runs arms on scenes or photos and prints the table of all that were run."""
    torch.set_num_threads(1)
    out = out.resolve()
    results = out / data
    stores = (stores or out / f"{data}-stores").resolve()
    for changes in ([], *(arms_of(data)[arm] for arm in arms or arms_of(data))):
        extract_stores(data, changes, stores, scenes)
    for seed in seeds:
        for depth in depths:
            for arm in arms or arms_of(data):
                name = arm.replace(", ", "+").replace(" ", "-")
                path = results / f"{name}-L{depth}-{seconds:g}s-{count}-seed{seed}.json"
                if not path.is_file():
                    print(f"== {path.stem}", flush=True)
                    write_json(path, run(data, arm, arms_of(data)[arm], depth, seed, seconds, count, stores, out))
    show(results)


if __name__ == "__main__":
    main()
