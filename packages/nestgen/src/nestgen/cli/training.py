"""`info`, `train` and `ema`: the denoisers of a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from nestgen.cli.options import (
    depth_option,
    level_option,
    recipe_of,
    recipe_option,
    sigma_option,
    training_set_option,
)
from nestgen.training.launch import launch


@click.command()
@recipe_option
@depth_option
@sigma_option
def info(recipe_file: Path | None, depth: int | None, sigmas: tuple[float, ...] | None) -> None:
    """Shows levels, parameters, GFlops, stores and denoisers.

    Example: nestgen info --depth 2
    """
    from nestgen.cli.info import show

    click.echo(show(recipe_of(recipe_file, depth, sigmas)))


@click.command()
@level_option
@recipe_option
@depth_option
@sigma_option
@click.option("--steps", type=click.IntRange(1), help="Train to so many steps, whatever the recipe says.")
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Processes of this machine that share the training, each on a GPU of its own or a share of the cores.",
)
@click.option(
    "--init",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="First weights: a published U-ViT checkpoint (nnet_ema.pth) or another denoiser's safetensors.",
)
@training_set_option
@click.option("--verify", is_flag=True, help="Read the stores whole first and compare them with their digests.")
@click.pass_context
def train(
    context: click.Context,
    level: int,
    recipe_file: Path | None,
    depth: int | None,
    sigmas: tuple[float, ...] | None,
    steps: int | None,
    processes: int,
    init: Path | None,
    settings: dict[str, Any],
    verify: bool,
) -> None:
    """Trains a level's denoiser, from its newest checkpoint on. Levels may train side by side.

    Ctrl-C finishes the step under way and saves it. Over several machines: `accelerate launch -m nestgen train --level 0`
    or `torchrun -m nestgen train --level 0`.

    Example: nestgen train --level 0 --set batch=64
    """

    settings |= {} if steps is None else {"steps": steps}
    recipe = recipe_of(recipe_file, depth, sigmas).with_training(settings)
    recipe.check_level(level)
    if verify:
        from nestgen.stores.verify import verify_level

        verify_level(recipe, level)
    if processes > 1:
        sigma = None if sigmas is None else ",".join(map(str, sigmas))
        options = {"recipe": recipe_file, "depth": depth, "sigma": sigma, "init": init, "level": level}
        arguments = [f"--{name}={value}" for name, value in options.items() if value is not None]
        arguments += [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
        context.exit(launch(processes, ["train", *arguments]))
    from nestgen.training.train import train

    train(recipe, level, init, settings)


@click.command()
@level_option
@click.option(
    "--length", type=float, required=True, help="Standard deviation of the average's window, as a share of the steps."
)
@click.option("--name", required=True, help="The run to write: runs/NAME, to sample from by a recipe of that name.")
@click.option("--step", type=click.IntRange(1), help="Up to that step; the newest snapshot's by default.")
@recipe_option
@depth_option
@sigma_option
def ema(
    level: int,
    length: float,
    name: str,
    step: int | None,
    recipe_file: Path | None,
    depth: int | None,
    sigmas: tuple[float, ...] | None,
) -> None:
    """Averages the weights of a training over any share of its steps.

    It needs the snapshots that training.ema_snapshots saves. The average is a run of its own, to sample from.

    Example: nestgen ema --level 0 --length 0.08 --name longer
    """
    from nestgen.runs.ema_snapshots import reconstruct

    click.echo(reconstruct(recipe_of(recipe_file, depth, sigmas), level, length, name, step))
