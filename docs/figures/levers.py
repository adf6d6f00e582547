"""Draws what each lever alone is worth: the figure of docs/levers.md, and prints its table.

    python -m benchmarks.levers scenes --seconds 120 --count 1000
    python docs/figures/levers.py levers/scenes

Without a folder of results the figure is drawn anew from the numbers beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import click
from matplotlib.figure import Figure

FILE = Path(__file__).with_suffix(".json")
SPACES = {
    "tiny": "tiny 1x1x64",
    "z_0": "decoded and encoded again, without bias",
}
LABELS = {"tiny": "Fréchet distance, tiny's features", "z_0": "Fréchet distance, z_0 without bias"}
TICKS = (3, 5, 7, 10, 12, 15, 20, 25, 30, 50, 100)
# The names of benchmarks/lever_arms.py, as a recipe writes them.
NAMES = {
    "today": "as mini was",
    "scenes' best": "the best together",
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
Row = dict[str, Any]  # {"arm", "depth", "seeds", "steps", space: one distance of each seed}


def read(folders: tuple[Path, ...], seconds: float, count: int) -> list[Row]:
    """One row for each named arm and depth."""
    runs = [json.loads(file.read_text()) for folder in folders for file in sorted(folder.glob("*-seed*.json"))]
    runs = [run for run in runs if run["arm"] in NAMES and (run["seconds"], run.get("count")) == (seconds, count)]
    rows: dict[tuple[str, int], Row] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        row = rows.setdefault(
            (run["arm"], run["depth"]),
            {"arm": run["arm"], "depth": run["depth"], "seconds": run["seconds"], "seeds": [], "steps": run["steps"]}
            | {space: [] for space in SPACES},
        )
        row["seeds"].append(run["seed"])
        for space, name in SPACES.items():
            row[space].append(round(run["frechet_distances"][name], 2))
    return [rows[key] for key in sorted(rows, key=lambda key: (list(NAMES).index(key[0]), key[1]))]


def table(rows: list[Row]) -> str:
    """In Markdown: the mean of the seeds, and the least and the largest."""
    by = {(row["arm"], row["depth"]): row for row in rows}
    depths = sorted({row["depth"] for row in rows})
    heads = ["arm", *(f"L = {depth}, {what}" for depth in depths for what in ("steps", *SPACES))]
    lines = [heads, ["---"] * len(heads)]
    for arm in (arm for arm in NAMES if any((arm, depth) in by for depth in depths)):
        cells = [NAMES[arm]]
        for depth in depths:
            row = by.get((arm, depth))
            cells += [", ".join(map(str, row["steps"])), *(_span(row[space]) for space in SPACES)] if row else [""] * 3
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _span(values: list[float]) -> str:
    """Like `16.1 (15.5-16.8)`."""
    return f"{mean(values):.1f}" + (f" ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else "")


def draw(rows: list[Row], out: Path) -> None:
    """A line for each arm: a dot for each seed, L = 1 and L = 3, in both spaces."""
    by = {(row["arm"], row["depth"]): row for row in rows}
    arms = [arm for arm in NAMES if (arm, 1) in by or (arm, 3) in by]
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    panels = figure.subplots(1, len(SPACES), sharey=True)
    for axes, (space, label) in zip(panels, LABELS.items()):
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
    panels[0].set_yticks(range(len(arms)), [NAMES[arm] for arm in arms])
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(out, dpi=110)


@click.command()
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--seconds", default=120.0, show_default=True, help="Of the runs that are taken.")
@click.option("--count", default=1000, show_default=True, help="Samples of the runs that are taken.")
def main(folders: tuple[Path, ...], seconds: float, count: int) -> None:
    """Draws the results of FOLDERS, and writes their numbers beside the figure."""
    if folders:
        rows = read(folders, seconds, count)
        if not rows:
            raise click.ClickException(f"no run there took {seconds:g} seconds and has {count} samples")
        FILE.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    rows = json.loads(FILE.read_text())
    draw(rows, FILE.with_suffix(".png"))
    click.echo(table(rows))


if __name__ == "__main__":
    main()
