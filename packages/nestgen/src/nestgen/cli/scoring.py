"""Scores and inspections of samples: `evaluate`, `diagnose`, `nearest` and `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nestgen.cli.options import Root, recipe_of, recipe_option, reference_option, set_option, sigma_option, vae_option

if TYPE_CHECKING:
    from upath import UPath


@click.command()
@click.option("--samples", type=click.Path(path_type=Path), required=True, help="Folder of `nestgen sample`.")
@click.option(
    "--reference",
    type=Root(),
    help="Store root to score against; by default the recipe's evaluation.reference, else the training rows.",
)
@click.option(
    "--samples-store",
    type=Root(),
    help="Store root of the encoded samples: `featurize extract folder:SAMPLES --basis ...`.",
)
@click.option("--level-shape", help="The level of --samples-store that is compared; 1x1x64 by default.")
@click.option("--encoder", help="The encoder that made that level; the recipe's by default.")
@click.option(
    "--pictures",
    type=click.Path(path_type=Path),
    help="Real images for an FID: a folder, or an .npz of mu and sigma; the recipe's evaluation.pictures by default.",
)
@click.option(
    "--inception", type=click.Path(path_type=Path), help="Inception's weights for an FID, if not in torch's cache."
)
@click.option("--out", type=click.Path(path_type=Path), help="The card; SAMPLES/evaluation.json by default.")
@recipe_option
@vae_option
def evaluate(
    samples: Path,
    reference: Path | UPath | None,
    samples_store: Path | UPath | None,
    level_shape: str | None,
    encoder: str | None,
    pictures: Path | None,
    inception: Path | None,
    out: Path | None,
    recipe_file: Path | None,
    vae: Path | None,
) -> None:
    """Scores samples per level, in the encoder's space and by FID.

    All scores go into one card (docs/evaluation.md).

    Example: nestgen evaluate --samples samples
    """
    from nestgen.scoring.evaluate import References, evaluate

    if samples_store is None and (level_shape, encoder) != (None, None):
        raise click.UsageError("--level-shape and --encoder are of --samples-store; give it too")
    references = References(reference, samples_store, level_shape or "1x1x64", encoder, pictures, inception, vae)
    evaluate(recipe_of(recipe_file, None), samples, references, out or samples / "evaluation.json")


@click.command()
@click.option("--samples", type=click.Path(path_type=Path), required=True, help="Folder of `nestgen sample`.")
@reference_option
@click.option("--out", type=click.Path(path_type=Path), default=Path("diagnosis.png"), show_default=True)
@recipe_option
@sigma_option
@set_option
def diagnose(
    samples: Path,
    reference: Path | UPath | None,
    out: Path,
    recipe_file: Path | None,
    sigmas: tuple[float, ...] | None,
    settings: dict[str, Any],
) -> None:
    """Shows which level loses quality.

    Each level is scored under true levels above it and under generated ones; their difference is what those cost.

    The numbers go to OUT with the ending .json, the latents sampled for it to the folder OUT without an ending.

    Example: nestgen diagnose --samples samples
    """
    from nestgen.scoring.diagnose import diagnose

    diagnose(recipe_of(recipe_file, None, sigmas, settings), samples, reference, out)


@click.command()
@click.option("--samples", type=click.Path(path_type=Path), required=True, help="Folder of `nestgen sample`.")
@click.option("--count", type=click.IntRange(1), default=10, show_default=True, help="Samples on the sheet.")
@reference_option
@click.option("--out", type=click.Path(path_type=Path), default=Path("nearest.png"), show_default=True)
@vae_option
@recipe_option
def nearest(
    samples: Path, count: int, reference: Path | UPath | None, out: Path, vae: Path | None, recipe_file: Path | None
) -> None:
    """Looks for memorised images among samples.

    A sheet shows samples with their nearest training rows at each level.

    How near all samples are, beside held-out images, goes to OUT with the ending .json.

    Example: nestgen nearest --samples samples
    """
    from nestgen.scoring.memorisation import memorisation

    memorisation(recipe_of(recipe_file, None), samples, out, count, reference, vae)


@click.command()
@click.argument("cards", metavar="CARD...", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--grid", type=click.Path(path_type=Path), help="Draw a grid of depths and sigmas to this PNG instead.")
@click.option("--space", help="Space of the grid; by default the last that all cards have.")
@click.option("--score", help="Score of the grid; frechet_distance by default.")
def compare(cards: tuple[Path, ...], grid: Path | None, space: str | None, score: str | None) -> None:
    """Puts score cards side by side, or says why not.

    Example: nestgen compare one.json two.json
    """
    from nestgen.scoring import compare

    if grid is None and (space, score) != (None, None):
        raise click.UsageError("--space and --score are of --grid; give it too")
    table = compare.compare(cards) if grid is None else compare.grid(cards, space, score or "frechet_distance", grid)
    click.echo(table)
