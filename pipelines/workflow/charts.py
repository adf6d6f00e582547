"""Charts of a report, as SVG that takes the colour of the page's text: so they suit a light and a dark page."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.figure import Figure

from workflow.sentences import SpaceScores

INK = "#010203"  # stands for the colour of the text
COLOURS = ("#3b82c4", "#e07b39", "#4a9d5b", "#a86bc0", "#c2524e", "#8a8a3a")  # seen on white and on black
STYLE: Any = {
    **{f"{part}.color": INK for part in ("text", "xtick", "ytick")},
    **{f"axes.{part}": INK for part in ("edgecolor", "labelcolor")},
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "report",
}


def score_bars(scores: Sequence[SpaceScores], depths: Sequence[int]) -> str:
    """Fréchet distance over L in each space that every depth has, relative to that of the first."""
    compared = [one for one in scores if one.complete]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5, 2.8), layout="constrained")
        axes = figure.subplots()
        for number, one in enumerate(compared):
            heights = [distance / one.complete[0] for distance in one.complete]
            positions = [
                place + (number - (len(compared) - 1) / 2) * 0.8 / len(compared) for place in range(len(depths))
            ]
            axes.bar(positions, heights, width=0.75 / len(compared), label=one.space)
        axes.set_xticks(range(len(depths)), [f"L = {depth}" for depth in depths])
        axes.set_ylabel(f"Fréchet distance / that of L = {depths[0]}")
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        return _svg(figure)


def loss_curves(runs: Path) -> str:
    """Training loss over the steps, of every denoiser of a run."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 3.4), layout="constrained")
        axes = figure.subplots()
        for log in sorted(runs.glob("*/log.jsonl")):
            records = [json.loads(line) for line in log.read_text().splitlines()]
            kept = [(one["step"], one["loss"]) for one in records if one.get("loss") is not None]
            axes.plot([step for step, _ in kept], [loss for _, loss in kept], label=_denoiser_name(log.parent.name))
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        return _svg(figure)


def _denoiser_name(folder: str) -> str:
    return folder.replace("z", "z_", 1).replace("-z", " z_").replace("-sigma", ", σ ").replace("-", " ")


def _svg(figure: Figure) -> str:
    """The figure as an <svg> element without size or background."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    element = text.getvalue().partition("<svg ")[2].replace(INK, "currentColor")
    return f'<svg aria-hidden="true" {element}'
