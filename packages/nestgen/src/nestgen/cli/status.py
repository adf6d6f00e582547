"""Where an experiment stands: what `nestgen` says without a command in a folder with a recipe."""

from __future__ import annotations

import re
from collections.abc import Iterator

from nestgen.denoiser.config import denoiser_config
from nestgen.denoiser.flops import count, training_petaflops
from nestgen.errors import UserError
from nestgen.recipe.locations import run_dir, store_path
from nestgen.recipe.recipe import Recipe
from nestgen.runs import loss_log
from nestgen.runs.checkpoint import newest
from nestgen.sampling.card import read_card
from nestgen.stores.store import open_store


def status(recipe: Recipe) -> str:
    """Stores, denoisers, samples and scores in lines, and the next command."""
    lines, todo = [f"{recipe.file}: {recipe.name}, {len(recipe.levels)} level(s)", ""], []
    for part in (_stores, _denoisers, _samples):
        for line, command in part(recipe):
            lines.append(line)
            todo += [command] * (command is not None)
    run = run_dir(recipe, 0).parent
    done = f"nestgen explore {run}\n      nestgen export {run} --out {recipe.name}-model"
    return "\n".join([*lines, "", f"Next: {todo[0] if todo else done}", "", "`nestgen --help` lists all commands."])


# A line of what is there, and the command that is missing, if any.
Lines = Iterator[tuple[str, str | None]]


def _stores(recipe: Recipe) -> Lines:
    for level in range(len(recipe.levels)):
        try:
            store = open_store(store_path(recipe, level))
            yield f"z_{level}  {store.rows:,} rows in {store.path}", None
        except UserError as error:
            advised = re.findall(r"`(.+?)`", str(error))
            yield f"z_{level}  {error}", advised[0] if advised else None


def _denoisers(recipe: Recipe) -> Lines:
    for level in range(len(recipe.levels)):
        folder, steps = run_dir(recipe, level), recipe.training.steps
        try:
            checkpoint = newest(folder)
        except UserError as error:
            yield f"D_{level}  {error}", None
            continue
        step = checkpoint.step if checkpoint else 0
        state = f"step {step:,} of {steps:,}" if step else "not trained"
        command = f"nestgen train --level {level}{_duration(recipe, level, 1 - step / steps)}" if step < steps else None
        yield f"D_{level}  {state}, in {folder}", command


def _samples(recipe: Recipe) -> Lines:
    """The sample folders of this recipe, the number of their images, and whether they have a score card."""
    folders = 0
    for card in sorted(recipe.root.glob("*/sample.json")):
        try:
            images = read_card(recipe, card.parent)["count"]
        except UserError:
            continue  # of another recipe
        folders += 1
        scored = (card.parent / "evaluation.json").is_file()
        command = None if scored else f"nestgen evaluate --samples {card.parent}"
        yield f"{images:,} samples in {card.parent}{', scored' if scored else ''}", command
    if not folders:
        yield "no samples", "nestgen sample --count 64 --out samples"


def _duration(recipe: Recipe, level: int, share: float) -> str:
    """How long a share of a level's training takes, by the speed of the run's last training; nothing before the first."""
    rates = [
        records[-1]["gflop_per_second"]
        for log in sorted(run_dir(recipe, level).parent.glob("*/log.jsonl"))
        if (records := loss_log.read(log)) and records[-1].get("gflop_per_second")
    ]
    if not rates:
        return ""
    seconds = share * 1e6 * training_petaflops(recipe, count(denoiser_config(recipe, level))) / rates[-1]
    number, unit = next((seconds / size, unit) for size, unit in _UNITS if seconds >= size or size == 1)
    return f"    (about {number:.0f} {unit}{'' if round(number) == 1 else 's'})"


_UNITS = ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))
