"""What a page of results is made of: kept beside it, so that a page can be written anew without the experiment."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from workflow.plan import Cell, Plan

# The pictures of an experiment, and what they show.
PICTURES = {
    "samples.png": "The same seeds at each depth.",
    "table.png": "Fréchet distance over depth and σ.",
    "hierarchy.png": "Levels frozen from k up, the rest drawn anew.",
    "knn.png": "Nearest neighbours at each level.",
    "knn-overlap.png": "Share of nearest neighbours that two levels have in common.",
}
OF_THE_SOURCE = "knn.png"  # shows its pictures: photos have terms of their own and stay with the experiment
NUMBERS = ("table.json", "hierarchy.json", "knn.json")
CARDS, COST, RECIPE, NOTES = "cards", "cost.json", "recipe.yaml", "notes.md"


def keep(plan: Plan, recipe: Path, experiment: Path, out: Path) -> None:
    """Copy what an experiment's folder holds of a recipe to `out`, in place of what an earlier run left there.

    Nothing happens where it was not run. Cards of anything else than this recipe, as of a rehearsal, do not count. What was
    written by hand, `notes.md`, stays.
    """
    cards = {cell.name: card for cell in plan.cells() if (card := _card(plan, cell, experiment)) is not None}
    if not was_run(plan, experiment, cards):
        return
    out.mkdir(parents=True, exist_ok=True)
    are_ours = str(plan.document["features"].get("source")).startswith("scenes:")
    for name in (*PICTURES, *NUMBERS):
        (out / name).unlink(missing_ok=True)
        if (experiment / name).is_file() and (are_ours or name != OF_THE_SOURCE):
            shutil.copyfile(experiment / name, out / name)
    shutil.rmtree(out / CARDS, ignore_errors=True)
    for name, card in cards.items():
        (out / CARDS).mkdir(exist_ok=True)
        _write(out / CARDS / f"{name}.json", card)
    logs = sorted(_logs(plan, experiment)) if cards else []
    if logs:
        _write(out / COST, {"denoisers": len(logs), "hours": round(sum(map(training_seconds, logs)) / 3600, 3)})
    shutil.copyfile(recipe, out / RECIPE)


def was_run(plan: Plan, folder: Path, cards: Mapping[str, Any]) -> bool:
    """Whether there is anything to show. A recipe of no hierarchy leaves the nearest neighbours only."""
    return bool(cards) if plan.depths else (folder / "knn.json").is_file()


def cards_of(plan: Plan, out: Path) -> dict[str, dict[str, Any]]:
    """The score cards that are kept of a recipe, by the cell's name."""
    files = {cell.name: out / CARDS / f"{cell.name}.json" for cell in plan.cells()}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


def cost_of(out: Path) -> dict[str, Any] | None:
    """`denoisers` that were trained, and `hours` that it took on one device."""
    return json.loads((out / COST).read_text()) if (out / COST).is_file() else None


def is_of_another(recipe: Path, out: Path) -> bool:
    """Whether the recipe has changed since it was run."""
    return (out / RECIPE).is_file() and _document(out / RECIPE) != _document(recipe)


def notes_of(out: Path) -> str:
    """What was written by hand: where the run disagrees with the paper, and what was tried."""
    return (out / NOTES).read_text(encoding="utf-8").strip() if (out / NOTES).is_file() else ""


def training_seconds(log: Path) -> float:
    """Seconds that a denoiser's steps took, by the rates in its log."""
    batch = _document(log.parent / "recipe.yaml")["training"]["batch"]
    seconds, before = 0.0, 0
    for line in log.read_text().splitlines():
        record = json.loads(line)
        seconds += (record["step"] - before) * batch / record["samples_per_second"]
        before = record["step"]
    return seconds


def _card(plan: Plan, cell: Cell, experiment: Path) -> dict[str, Any] | None:
    path = experiment / "samples" / cell.name / "evaluation.json"
    card = json.loads(path.read_text()) if path.is_file() else None
    return card if card and card["samples"]["recipe"] == plan.run_name(cell.seed) else None


def _logs(plan: Plan, experiment: Path) -> Iterator[Path]:
    for seed in plan.seeds:
        yield from (experiment / "runs" / plan.run_name(seed)).glob("*/log.jsonl")


def _document(recipe: Path) -> Any:
    return yaml.safe_load(recipe.read_text(encoding="utf-8"))


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
