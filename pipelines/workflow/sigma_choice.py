"""Chooses σ by the scores of a depth's hierarchies, and tells later steps of the workflow what was chosen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

existing = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.group()
def main() -> None:
    """Choose σ, and say what was chosen."""


@main.command()
@click.argument("cards", type=existing, nargs=-1, required=True)
@click.option("--space", help="Space of the Fréchet distance; the last that all cards have by default.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def best(cards: tuple[Path, ...], space: str | None, out: Path) -> None:
    """Write the best σ among the score CARDS of one depth to OUT."""
    chosen = choose({path.parent.name: json.loads(path.read_text()) for path in cards}, space)
    draft = out.with_name(f".{out.name}.tmp")
    draft.write_text(json.dumps(chosen, indent=1) + "\n")
    draft.replace(out)
    click.echo(
        f"σ {', '.join(f'{one:g}' for one in chosen['sigmas'])} of {chosen['cell']} is best in {chosen['space']}"
    )


def choose(cards: dict[str, dict[str, Any]], space: str | None) -> dict[str, Any]:
    """The σ with the smallest Fréchet distance, averaged over the seeds; of equal ones the smaller.

    `cards` are score cards of `nestgen evaluate` by their cell's name. Raises ClickException where a card lacks the space.
    """
    spaces = [[score["space"] for score in card["scores"]] for card in cards.values()]
    common = [name for name in spaces[0] if all(name in others for others in spaces)]
    if not common or (space is not None and space not in common):
        raise click.ClickException(f"the score cards have no space {space or 'in common'}; in all of them: {common}")
    space = space or common[-1]
    distances: dict[tuple[float, ...], list[float]] = {}
    names: dict[tuple[float, ...], str] = {}
    for name, card in cards.items():
        sigmas = tuple(float(level["condition_sigma"]) for level in card["samples"]["levels"][:-1])
        distance = next(score["frechet_distance"] for score in card["scores"] if score["space"] == space)
        distances.setdefault(sigmas, []).append(distance)
        names.setdefault(sigmas, name)  # of the first seed
    means = {sigmas: sum(values) / len(values) for sigmas, values in distances.items()}
    sigmas = min(means, key=lambda one: (means[one], one))
    tried = [{"sigmas": list(one), "mean": means[one], "distances": distances[one]} for one in sorted(means)]
    return {"sigmas": list(sigmas), "cell": names[sigmas], "space": space, "tried": tried}


@main.command()
@click.argument("chosen", type=existing)
@click.option("--then", help="σ of one more level.")
def sigmas(chosen: Path, then: str | None) -> None:
    """Print the σ in the file CHOSEN as --sigma takes them."""
    print(",".join([f"{one:g}" for one in json.loads(chosen.read_text())["sigmas"]] + ([then] if then else [])))


@main.command()
@click.argument("cells", nargs=-1, required=True)
@click.option("--prefix", default="", help="Put before each.")
def cells(cells: Sequence[str], prefix: str) -> None:
    """Print cells' names: each of CELLS is one, or a file written by `best`."""
    print(
        " ".join(
            prefix + (json.loads(Path(one).read_text())["cell"] if one.endswith(".json") else one) for one in cells
        )
    )


if __name__ == "__main__":
    main()
