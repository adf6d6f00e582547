"""Options that several commands have, and the recipe as they change it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from upath import UPath

    from nestgen.recipe.recipe import Recipe


class Root(click.ParamType):
    """A store root: a folder, or an address such as s3://bucket/stores."""

    name = "root"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> Path | UPath:
        """The path, or the address."""
        from nestgen.recipe.locations import resolve_path

        return resolve_path(Path(), value)


recipe_option = click.option(
    "--recipe",
    "recipe_file",
    type=click.Path(path_type=Path),
    help="The recipe, ./nested.yaml by default.",
)
depth_option = click.option("--depth", type=int, help="Cut the hierarchy to its first so many levels.")
level_option = click.option(
    "--level", type=int, required=True, help="The level whose denoiser is meant; 0 is the data."
)
seed_option = click.option(
    "--seed", type=click.IntRange(0), help="Image i depends on it and i; the recipe's by default."
)
store_option = click.option("--store", type=Root(), help="Store root of the rows; the training rows by default.")
vae_option = click.option(
    "--vae", type=click.Path(path_type=Path), help="The VAE's weights, if they are not where z_0's store says."
)
reference_option = click.option(
    "--reference",
    type=Root(),
    help="Store root of held-out images; by default the recipe's evaluation.reference, else the training rows.",
)


class Sigmas(click.ParamType):
    """Numbers separated by commas."""

    name = "sigma,..."

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """The numbers."""
        try:
            return tuple(float(one) for one in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers, such as 1,0.5")


class NumberOr(click.ParamType):
    """A whole number, or a word."""

    def __init__(self, name: str, word: str) -> None:
        self.name, self.word = name, word

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """The number, or the word."""
        if value != self.word and not value.isdecimal():
            self.fail(f"{value!r} is neither a {self.name} number nor `{self.word}`")
        return value if value == self.word else int(value)


sigma_option = click.option(
    "--sigma", "sigmas", type=Sigmas(), help="Noise on levels 1, 2, ... as conditions, instead of the recipe's."
)


class Setting(click.ParamType):
    """KEY=VALUE of a section of the recipe, the value in YAML."""

    name = "key=value"

    def __init__(self, section: str) -> None:
        self.section = section

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, object]:
        """The key and the value."""
        from nestgen.recipe.yaml import parse_yaml

        key, equals, text = value.partition("=")
        if not equals:
            self.fail(f"{value!r} is not KEY=VALUE, such as steps=20")
        return key.strip().removeprefix(f"{self.section}."), parse_yaml(text, f"--set {key}")


def _set_option(section: str, examples: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(
        "--set",
        "settings",
        type=Setting(section),
        multiple=True,
        callback=lambda ctx, param, pairs: dict(pairs),
        metavar="KEY=VALUE",
        help=f"Another value of a key of `{section}`: {examples}",
    )


set_option = _set_option("sampling", "steps=20, guidance='[0.5, 1, 0]', sampler=heun, ...")
training_set_option = _set_option(
    "training",
    "batch=64, ... A run that goes on takes another lr, warmup or clip, and other steps where lr_decay ends with them, "
    "only from here.",
)


def recipe_of(
    file: Path | None,
    depth: int | None,
    sigmas: tuple[float, ...] | None = None,
    settings: dict[str, Any] | None = None,
) -> Recipe:
    """The recipe of a command, cut and changed as its options say."""
    from nestgen.recipe.recipe import load_recipe

    recipe = load_recipe(file)
    if depth is not None:
        recipe = recipe.depth(depth)
    if sigmas is not None:
        recipe = recipe.with_sigmas(sigmas)
    return recipe.with_sampling(settings) if settings else recipe
