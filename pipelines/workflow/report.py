"""Writes an experiment's images, loss curves and scores as one self-contained page."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import click
import jinja2
import matplotlib
from matplotlib import pyplot
from matplotlib.figure import Figure

from nestgen.recipe.yaml import read_yaml

matplotlib.use("Agg")
TEMPLATE = Path(__file__).with_name("report.html.j2")


@click.command()
@click.argument("cells", nargs=-1, required=True)
@click.option("--runs", type=click.Path(path_type=Path), required=True, help="Folder of the trained denoisers.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The page.")
def main(cells: tuple[str, ...], runs: Path, out: Path) -> None:
    """Write the report of the experiment in the working directory: CELLS are the best hierarchies of each depth."""
    cards = [json.loads(Path(f"samples/{cell}/evaluation.json").read_text()) for cell in cells]
    hierarchy = json.loads(Path("hierarchy.json").read_text())
    page = (
        jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
        .from_string(TEMPLATE.read_text(encoding="utf-8"))
        .render(
            recipe=read_yaml(Path("nested.yaml")),
            recipe_text=Path("nested.yaml").read_text(),
            knn=json.loads(Path("knn.json").read_text()),
            hierarchy=hierarchy,
            preserved=next((row["kept"] for row in hierarchy["rows"] if "kept" in row), None),
            spaces=score_table(cards),
            best=[(card["samples"]["depth"], _sigmas(card)) for card in cards],
            table=table(Path("table.json")),
            card=cards[-1]["samples"],
            image=image_address,
            losses=figure_address(loss_curves(runs)),
            scores=figure_address(score_bars(cards)),
        )
    )
    draft = out.with_name(f".{out.name}.tmp")
    draft.write_text(page, encoding="utf-8")
    draft.replace(out)


def score_table(cards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per space: its name, dimensions, the floor (real against real), and the distance for each L or None."""
    lines: dict[str, dict[str, Any]] = {}
    for card in cards:
        for score in card["scores"]:
            line = lines.setdefault(
                score["space"],
                {"space": score["space"], "dimensions": score["dimensions"], "floor": None, "distances": {}},
            )
            line["distances"][card["samples"]["depth"]] = score["frechet_distance"]
            line["floor"] = score.get("floor", {}).get("frechet_distance")
    depths = [card["samples"]["depth"] for card in cards]
    return [line | {"distances": [line["distances"].get(depth) for depth in depths]} for line in lines.values()]


def _sigmas(card: dict[str, Any]) -> list[float]:
    return [level["condition_sigma"] for level in card["samples"]["levels"][:-1]]


def table(path: Path) -> dict[str, Any] | None:
    """Scores over depths and σ: for each depth the mean and spread at each σ. None where only one σ was tried."""
    if not path.is_file():
        return None
    scores = json.loads(path.read_text())
    sigmas = sorted({cell["sigma"] for cell in scores["cells"] if cell["sigma"] is not None})
    lines: dict[int, dict[Any, Any]] = {}
    for cell in scores["cells"]:
        lines.setdefault(cell["depth"], {})[cell["sigma"]] = cell
    return {**scores, "sigmas": sigmas, "lines": lines}


def score_bars(cards: list[dict[str, Any]]) -> Figure:
    """Fréchet distance over L in the encoder's space and in z_0's, each relative to L = 1."""
    figure, axes = pyplot.subplots(figsize=(5, 2.6), layout="constrained")
    depths = [card["samples"]["depth"] for card in cards]
    complete = [line for line in score_table(cards) if None not in line["distances"]]
    for number, line in enumerate(complete):
        heights = [distance / line["distances"][0] for distance in line["distances"]]
        positions = [depth + (number - (len(complete) - 1) / 2) * 0.35 for depth in depths]
        axes.bar(positions, heights, width=0.33, label=line["space"])
    axes.set_xticks(depths, [f"L = {depth}" for depth in depths])
    axes.set_ylabel("Fréchet distance / that of L = 1")
    axes.legend(frameon=False)
    return figure


def loss_curves(runs: Path) -> Figure:
    """Training loss over steps of every denoiser of a run."""
    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    for log in sorted(runs.glob("*/log.jsonl")):
        records = [json.loads(line) for line in log.read_text().splitlines()]
        steps, losses = zip(*[(record["step"], record["loss"]) for record in records])
        axes.plot(steps, losses, label=log.parent.name.replace("z", "z_", 1).replace("-z", " z_").replace("-", " "))
    axes.set_xlabel("step")
    axes.set_ylabel("loss (mean squared error on ε)")
    axes.set_ylim(bottom=0, top=1.1)
    axes.legend(frameon=False)
    return figure


def figure_address(figure: Figure) -> str:
    """The figure as a data: URL."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    pyplot.close(figure)
    return _address(buffer.getvalue())


def image_address(path: str) -> str:
    """An image file as a data: URL."""
    return _address(Path(path).read_bytes())


def _address(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


if __name__ == "__main__":
    main()
