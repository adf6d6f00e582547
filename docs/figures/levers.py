"""Draws what each lever alone is worth, on scenes or on photos: the figures of docs/levers.md, and prints their tables.

    python -m benchmarks.levers scenes --seconds 120 --count 1000
    python docs/figures/levers.py scenes levers/scenes

Without a folder of results the figure is drawn anew from the numbers beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import click
from matplotlib.figure import Figure

ENCODERS = {"scenes": "tiny", "photos": "ViT"}  # as the tables call them
RECIPES = {"scenes": "mini", "photos": "mini-photos"}
# What of benchmarks/levers.py is z_0's distance. Of photos it is in pixels, where samples are too few to take away the bias.
DISTANCES = {"scenes": "decoded and encoded again, without bias", "photos": "z_0"}
TICKS = (3, 5, 7, 10, 12, 15, 20, 25, 30, 50, 100)
# The names of benchmarks/lever_arms.py, as a recipe writes them.
NAMES = {
    "today": "as {recipe} was",
    "scenes' best": "the best together",
    "photos' best": "the best together",
    "codec": "codec scenes",
    "linear part": "gaussian: true",
    "positions": "positions: sinusoids",
    "muon, batch 64": "muon: 2e-3, batch 64",
    "flow": "flow, velocity",
    "flow, shift auto": "flow, shift: auto",
    "side loss": "side_loss: 0.25",
    "internal guidance 1.5": "... internal guidance 1.5",
    "logit-normal": "logit_normal: [0, 1]",
    "align": "align, weight 0.5",
    "decay": "lr_decay: linear",
    "cosine decay": "lr_decay: cosine",
    "inverse-sqrt decay": "lr_decay: inverse-sqrt",
}
Row = dict[str, Any]  # {"arm", "depth", "seeds", "steps", and a distance of each seed for each space}


def file_of(data: str) -> Path:
    """The numbers of a figure, which lies beside them."""
    return Path(__file__).with_name(f"levers-{data}.json")


def spaces_of(data: str) -> tuple[str, str]:
    """The encoder's space, which makes the levels, and z_0's, which makes none."""
    return ENCODERS[data], "z_0"


def read(data: str, folders: tuple[Path, ...], seconds: float, count: int) -> list[Row]:
    """One row for each named arm and depth."""
    encoder, z_0 = spaces_of(data)
    runs = [json.loads(file.read_text()) for folder in folders for file in sorted(folder.glob("*-seed*.json"))]
    runs = [run for run in runs if run["arm"] in NAMES and (run["seconds"], run.get("count")) == (seconds, count)]
    rows: dict[tuple[str, int], Row] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        row = rows.setdefault(
            (run["arm"], run["depth"]),
            {"arm": run["arm"], "depth": run["depth"], "seconds": run["seconds"], "seeds": [], "steps": run["steps"]}
            | {encoder: [], z_0: []},
        )
        row["seeds"].append(run["seed"])
        distances = run["frechet_distances"]
        row[encoder].append(
            round(next(distances[name] for name in distances if not name.startswith(("z_", "decoded"))), 2)
        )
        row[z_0].append(round(distances[DISTANCES[data]], 2))
    return [rows[key] for key in sorted(rows, key=lambda key: (list(NAMES).index(key[0]), key[1]))]


def table(data: str, rows: list[Row]) -> str:
    """In Markdown: the mean of the seeds, and the least and the largest."""
    spaces = spaces_of(data)
    by = {(row["arm"], row["depth"]): row for row in rows}
    depths = sorted({row["depth"] for row in rows})
    heads = ["arm", *(f"L = {depth}, {what}" for depth in depths for what in ("steps", *spaces))]
    lines = [heads, ["---"] * len(heads)]
    for arm in (arm for arm in NAMES if any((arm, depth) in by for depth in depths)):
        cells = [name_of(data, arm)]
        for depth in depths:
            row = by.get((arm, depth))
            cells += [", ".join(map(str, row["steps"])), *(_span(row[space]) for space in spaces)] if row else [""] * 3
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _span(values: list[float]) -> str:
    """Like `16.1 (15.5-16.8)`."""
    return f"{mean(values):.1f}" + (f" ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else "")


def name_of(data: str, arm: str) -> str:
    """What a recipe writes for an arm."""
    return NAMES[arm].format(recipe=RECIPES[data])


def draw(data: str, rows: list[Row], out: Path) -> None:
    """A line for each arm: a dot for each seed, L = 1 and L = 3, in both spaces."""
    encoder, z_0 = spaces_of(data)
    labels = {
        encoder: f"Fréchet distance, {encoder}'s features",
        z_0: f"Fréchet distance, {z_0}{' without bias' if 'without' in DISTANCES[data] else ''}",
    }
    by = {(row["arm"], row["depth"]): row for row in rows}
    arms = [arm for arm in NAMES if (arm, 1) in by or (arm, 3) in by]
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    panels = figure.subplots(1, len(labels), sharey=True)
    for axes, (space, label) in zip(panels, labels.items()):
        for depth, marker, color, shift in ((1, "o", "tab:orange", -0.15), (3, "s", "tab:blue", 0.15)):
            dots = [
                (value, place + shift)
                for place, arm in enumerate(arms)
                if (arm, depth) in by
                for value in by[arm, depth][space]
            ]
            axes.plot(*zip(*dots), marker, color=color, markersize=5, alpha=0.55, label=f"L = {depth}")
            if ("today", depth) in by:
                axes.axvline(mean(by["today", depth][space]), color=color, linewidth=0.8, linestyle="--")
        axes.set(xscale="log", xlabel=label)
        least, largest = axes.get_xlim()
        ticks = [value for value in TICKS if least < value < largest]
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(arms)), [name_of(data, arm) for arm in arms])
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(out, dpi=110)


@click.command()
@click.argument("data", type=click.Choice(list(ENCODERS)))
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--seconds", default=120.0, show_default=True, help="Of the runs that are taken.")
@click.option("--count", default=1000, show_default=True, help="Samples of the runs that are taken.")
def main(data: str, folders: tuple[Path, ...], seconds: float, count: int) -> None:
    """Draws the results of FOLDERS, and writes their numbers beside the figure."""
    file = file_of(data)
    if folders:
        rows = read(data, folders, seconds, count)
        if not rows:
            raise click.ClickException(f"no run there took {seconds:g} seconds and has {count} samples")
        file.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    rows = json.loads(file.read_text())
    draw(data, rows, file.with_suffix(".png"))
    click.echo(table(data, rows))


if __name__ == "__main__":
    main()
