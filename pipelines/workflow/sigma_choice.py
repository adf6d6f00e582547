"""Chooses σ by the scores of a depth's hierarchies, and prints the choice for later steps of the workflow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from nestgen.errors import UserError
from nestgen.scoring.compare import inception_of

existing_file = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.group()
def main() -> None:
    """Choose σ, and print what was chosen."""


@main.command()
@click.argument("cards", type=existing_file, nargs=-1, required=True)
@click.option("--space", help="Space of the Fréchet distance; by default the last that all cards have.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def best(cards: tuple[Path, ...], space: str | None, out: Path) -> None:
    """Write the best σ among the score CARDS of one depth to OUT."""
    choice = choose({path.parent.name: json.loads(path.read_text()) for path in cards}, space)
    draft = out.with_name(f".{out.name}.tmp")
    draft.write_text(json.dumps(choice, indent=1) + "\n")
    draft.replace(out)
    sigmas = ", ".join(f"{sigma:g}" for sigma in choice["sigmas"])
    click.echo(f"σ {sigmas} of {choice['cell']} is best in {choice['space']}")


def choose(cards: Mapping[str, Mapping[str, Any]], space: str | None) -> dict[str, Any]:
    """The σ with the smallest Fréchet distance, averaged over the seeds; of equal ones the smaller.

    `cards` are score cards of `nestgen evaluate` by their cell's name. Raises ClickException where a card lacks the space,
    and for FIDs that were measured in different ways.
    """
    spaces = [[score["space"] for score in card["scores"]] for card in cards.values()]
    common = [name for name in spaces[0] if all(name in others for others in spaces)]
    if not common or (space is not None and space not in common):
        raise click.ClickException(f"the score cards have no space {space or 'in common'}; in all of them: {common}")
    space = space or common[-1]
    distances: dict[tuple[float, ...], list[float]] = {}
    names: dict[tuple[float, ...], str] = {}
    scores = {name: next(one for one in card["scores"] if one["space"] == space) for name, card in cards.items()}
    try:
        inception_of(scores.values())
    except UserError as error:
        raise click.ClickException(str(error)) from None
    for name, card in cards.items():
        sigmas = tuple(float(level["condition_sigma"]) for level in card["samples"]["levels"][:-1])
        distances.setdefault(sigmas, []).append(scores[name]["frechet_distance"])
        names.setdefault(sigmas, name)  # of the first seed
    means = {sigmas: sum(values) / len(values) for sigmas, values in distances.items()}
    smallest = min(means, key=lambda sigmas: (means[sigmas], sigmas))
    tried = [
        {"sigmas": list(sigmas), "mean": means[sigmas], "distances": distances[sigmas]} for sigmas in sorted(means)
    ]
    return {"sigmas": list(smallest), "cell": names[smallest], "space": space, "tried": tried}


@main.command()
@click.argument("choice", type=existing_file)
@click.option("--then", help="σ of one more level.")
def sigmas(choice: Path, then: str | None) -> None:
    """Print the σ in the file CHOICE, written by `best`, as the option --sigma takes them."""
    chosen = [f"{sigma:g}" for sigma in json.loads(choice.read_text())["sigmas"]]
    print(",".join([*chosen, *([then] if then else [])]))


@main.command()
@click.argument("cells", nargs=-1, required=True)
@click.option("--prefix", default="", help="Put before each name.")
def cells(cells: Sequence[str], prefix: str) -> None:
    """Print names of cells: each of CELLS is one, or a file written by `best`."""
    names = [json.loads(Path(cell).read_text())["cell"] if cell.endswith(".json") else cell for cell in cells]
    print(" ".join(prefix + name for name in names))


if __name__ == "__main__":
    main()
