"""`knn-viz`: nearest neighbours at every level."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featurize.cli.options import parse_model_args, recipe_option
from featurize.errors import UserError
from featurize.io.files import resolve_path
from featurize.recipe import read_request


@click.command("knn-viz")
@recipe_option
@click.option("--stores", metavar="DIR,...", help="Store root, or several of the same images. [default: the recipe's]")
@click.option(
    "--encoder",
    metavar="NAME,...",
    help="Encoders whose levels are shown side by side. [default: the recipe's, else tiny]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="knn.png",
    show_default=True,
    help="The sheet; numbers and overlap go beside it.",
)
@click.option("--queries", type=click.IntRange(1, 50), default=4, show_default=True, help="Query images on the sheet.")
@click.option("--neighbours", type=click.IntRange(1, 30), default=8, show_default=True, help="Neighbours of each.")
@click.option("--rows", metavar="N|all", default="10000", show_default=True, help="Rows compared, by keyed hash.")
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses queries and rows.")
@click.option(
    "--index",
    type=click.Choice(["auto", "exact", "ivf"]),
    default="auto",
    show_default=True,
    help="auto is exact up to a million rows and FAISS's inverted file beyond.",
)
@click.option("--raw", is_flag=True, help="Encode the rows again and compare the features before the basis as well.")
@click.option(
    "--weights", metavar="FILE", help="Weights of the encoder, for --raw. [default: those it was extracted with]"
)
@click.option("--model-args", metavar="ARGS", help="Arguments of the model, for --raw. [default: likewise]")
def knn_viz(
    recipe: Path | None,
    stores: str | None,
    encoder: str | None,
    out: Path,
    queries: int,
    neighbours: int,
    rows: str,
    seed: int,
    index: str,
    raw: bool,
    weights: str | None,
    model_args: str | None,
) -> None:
    """Draw nearest neighbours at every level.

    How often their labels agree is printed. Several --encoder NAME,... or --stores DIR,... stand side by side on the sheet,
    for the same queries.

    Example: featurize knn-viz --stores stores/photos --rows all
    """
    from featurize.neighbours.knn import Compared
    from featurize.neighbours.knn import knn_viz as run_knn_viz

    roots, encoders = _several(stores), _several(encoder)
    given = {"out": roots[:1], "encoder": encoders[:1]}
    overrides = {key: value[0] for key, value in given.items() if value}
    features = read_request(recipe, overrides, None).features
    roots, encoders = roots or [features.out], encoders or [features.encoder]
    if len(roots) > 1 and len(encoders) not in (1, len(roots)):
        raise UserError(
            f"--stores names {len(roots)} roots and --encoder {len(encoders)}; give one for each, or one for all."
        )
    if raw and max(len(roots), len(encoders)) > 1:
        raise UserError("--raw encodes again with one encoder; name one store root and one encoder.")
    options: dict[str, Any] = {} if weights is None else {"weights": weights}
    if model_args is not None:
        options["model_args"] = parse_model_args(model_args)
    pairs = zip(roots * (len(encoders) if len(roots) == 1 else 1), encoders * (len(roots) if len(encoders) == 1 else 1))
    numbers = run_knn_viz(
        [Compared(resolve_path(root), name) for root, name in pairs],
        out,
        queries,
        neighbours,
        _count_of(rows),
        seed,
        index,
        options if raw else None,
    )
    _print_neighbours(numbers, out)


def _print_neighbours(numbers: dict[str, Any], out: Path) -> None:
    from featurize.neighbours.knn import overlap_path

    agreement, near = numbers["label_agreement"], numbers["neighbours"]
    wide = max(map(len, agreement))
    if numbers["chance"] is None:
        click.echo("These images have no labels, so there is no label agreement.")
    else:
        click.echo(
            f"Share of the {near} nearest neighbours with the query's label ({numbers['rows']:,} rows compared):"
        )
        for name, share in (agreement | {"chance": numbers["chance"]}).items():
            click.echo(f"  {name:<{wide}} {share:.1%}")
    for name, index in numbers["index"].items():
        if index["kind"] != "exact":
            click.echo(f"  {name:<{wide}} {index['described']}")
    click.echo(f"Share of the {near} nearest neighbours in common:")
    for name, shares in zip(numbers["overlap"]["spaces"], numbers["overlap"]["matrix"], strict=True):
        click.echo(f"  {name:<{wide}} " + " ".join(f"{share:4.0%}" for share in shares))
    click.echo(f"{out} shows the neighbours, {overlap_path(out)} what they have in common.")


def _several(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _count_of(rows: str) -> int | None:
    """Number of rows that --rows gives; None for all."""
    if rows == "all":
        return None
    if not rows.isdecimal() or int(rows) < 3:
        raise UserError(f"--rows is '{rows}'; give a number from 3 on, or all.")
    return int(rows)
