"""What a page of results is made of, copied beside it so that the page can be written again without the experiment."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nestgen.recipe.yaml import read_yaml
from nestgen.runs.loss_log import training_seconds
from workflow.plan import Cell, Plan

# Image files of an experiment, with their captions on the page.
IMAGES = {
    "samples.png": "The same seeds at each depth.",
    "table.png": "Fréchet distance over depth and σ.",
    "hierarchy.png": "Levels frozen from k up, the rest sampled anew.",
    "knn.png": "Nearest neighbours at each level: a label in green is the query's, in red another.",
    "knn-overlap.png": "Share of nearest neighbours that two levels have in common.",
}
SOURCE_IMAGES = "knn.png"  # shows images of the source; photos have their own licence terms and are not copied
NUMBERS = ("table.json", "hierarchy.json", "knn.json")
CARDS, COST, RECIPE, NOTES = "cards", "cost.json", "recipe.yaml", "notes.md"


def collect(plan: Plan, recipe: Path, experiment: Path, out: Path) -> None:
    """Copy the results in an experiment's folder to `out`, replacing those of an earlier run.

    Does nothing where the recipe was not run there; score cards of another recipe, or of a rehearsal, do not count.
    `notes.md`, which is written by hand, stays as it is.
    """
    cards = {cell.name: card for cell in plan.cells() if (card := _score_card(plan, cell, experiment)) is not None}
    if not was_run(plan, experiment, cards):
        return
    out.mkdir(parents=True, exist_ok=True)
    is_synthetic = str(plan.features.get("source")).startswith("scenes:")
    for name in (*IMAGES, *NUMBERS):
        (out / name).unlink(missing_ok=True)
        if (experiment / name).is_file() and (is_synthetic or name != SOURCE_IMAGES):
            shutil.copyfile(experiment / name, out / name)
    shutil.rmtree(out / CARDS, ignore_errors=True)
    for name, card in cards.items():
        (out / CARDS).mkdir(exist_ok=True)
        _write(out / CARDS / f"{name}.json", card)
    logs = sorted(_logs(plan, experiment)) if cards else []
    if logs:
        _write(out / COST, {"denoisers": len(logs), "hours": round(sum(map(_seconds, logs)) / 3600, 3)})
    shutil.copyfile(recipe, out / RECIPE)


def was_run(plan: Plan, folder: Path, cards: Mapping[str, Any]) -> bool:
    """Whether there is a result. A recipe without hierarchies has nearest neighbours only."""
    return bool(cards) if plan.depths else (folder / "knn.json").is_file()


def score_cards(plan: Plan, out: Path) -> dict[str, dict[str, Any]]:
    """A recipe's collected score cards, by the cell's name."""
    files = {cell.name: out / CARDS / f"{cell.name}.json" for cell in plan.cells()}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


def training_cost(out: Path) -> dict[str, Any] | None:
    """`denoisers`: how many were trained; `hours`: time of their training on one device."""
    return json.loads((out / COST).read_text()) if (out / COST).is_file() else None


def recipe_changed(recipe: Path, out: Path) -> bool:
    """Whether the recipe's values are others than when it was run; what its report shows besides does not count."""
    return (out / RECIPE).is_file() and _decisive(read_yaml(out / RECIPE)) != _decisive(read_yaml(recipe))


def _decisive(document: Any) -> dict[str, Any]:
    grid = {key: value for key, value in (document.get("grid") or {}).items() if key != "pretrained"}
    return {**document, "grid": grid}


def notes(out: Path) -> str:
    """Text written by hand: where the run disagrees with the paper, and what was tried."""
    return (out / NOTES).read_text(encoding="utf-8").strip() if (out / NOTES).is_file() else ""


def _score_card(plan: Plan, cell: Cell, experiment: Path) -> dict[str, Any] | None:
    path = experiment / "samples" / cell.name / "evaluation.json"
    card = json.loads(path.read_text()) if path.is_file() else None
    return card if card and card["samples"]["recipe"] == plan.run_name(cell.seed) else None


def _logs(plan: Plan, experiment: Path) -> Iterator[Path]:
    for seed in plan.seeds:
        yield from (experiment / "runs" / plan.run_name(seed)).glob("*/log.jsonl")


def _seconds(log: Path) -> float:
    recipe: Any = read_yaml(log.parent / "recipe.yaml")
    return training_seconds(log, recipe["training"]["batch"])


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
