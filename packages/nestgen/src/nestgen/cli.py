"""The command line: parses, calls, and turns errors into one sentence and an exit code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nestgen.errors import UserError


class Commands(click.Group):
    """A group whose commands end with `error: <sentence>` and exit code 1, or 130 when interrupted."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            sentence, code = f"error: {error}", 1
        except OSError as error:  # no space, no permission: the sentence is the system's
            where = f"{error.filename}: " if error.filename else ""
            sentence, code = f"error: {where}{error.strerror or error}", 1
        except KeyboardInterrupt as interrupt:
            sentence, code = str(interrupt) or "interrupted", 130
        click.echo(sentence, err=True)
        return ctx.exit(code)


recipe_option = click.option(
    "--recipe",
    "recipe_file",
    type=click.Path(path_type=Path),
    help="The recipe, ./nested.yaml by default.",
)
depth_option = click.option("--depth", type=int, help="Cut the hierarchy to its first so many levels.")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="nestgen")
def main() -> None:
    """Trains one denoiser per level of a hierarchy of stored latents, and samples from the top down."""


@main.command()
@recipe_option
@depth_option
def info(recipe_file: Path | None, depth: int | None) -> None:
    """Shows each level's shape, parameters and GFlops, and what stores and trained denoisers there are."""
    from nestgen.info import show
    from nestgen.recipe import load_recipe

    recipe = load_recipe(recipe_file)
    click.echo(show(recipe if depth is None else recipe.depth(depth)))


@main.command()
@click.option("--level", type=int, required=True, help="The level whose denoiser is trained; 0 is the data.")
@recipe_option
@depth_option
@click.option("--steps", type=click.IntRange(1), help="Train to so many steps, whatever the recipe says.")
def train(level: int, recipe_file: Path | None, depth: int | None, steps: int | None) -> None:
    """Trains a level's denoiser, going on from its newest checkpoint.

    Several processes: `accelerate launch --num_processes N -m nestgen train --level 0`.
    """
    from nestgen.recipe import load_recipe
    from nestgen.train import train

    recipe = load_recipe(recipe_file)
    if depth is not None:
        recipe = recipe.depth(depth)
    if steps is not None:
        recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": steps})})
    train(recipe, level)
