"""`encoders` lists the encoders, `check-encoder` examines one."""

from __future__ import annotations

import click

from featurize.cli.options import parse_model_args
from featurize.errors import UserError
from featurize.recipe import choices


@click.command()
def encoders() -> None:
    """List the encoders, and where their weights are.

    Example: featurize encoders
    """
    from featurize.encoders.table import table

    click.echo(table())


@click.command("check-encoder")
@click.argument("name")
@click.option("--weights", metavar="FILE", help="Weights of the encoder. Without it they are fetched by name.")
@click.option("--model-args", metavar="ARGS", help="Arguments of the network, as for extract.")
@click.option("--precision", type=click.Choice(choices("precision")), default="float32", show_default=True)
def check_encoder(name: str, weights: str | None, model_args: str | None, precision: str) -> None:
    """Check before a run that the encoder NAME is right.

    It is loaded, and its features of a few drawn images are examined: keys, activation, order of the grid, values.

    Example: featurize check-encoder clip --weights ViT-B-16.pt
    """
    import json

    from featurize.encoders import EncoderSpec
    from featurize.encoders.check import check_encoder as run_check
    from featurize.execution.devices import device_of_worker

    arguments = json.dumps(parse_model_args(model_args) if model_args else {}, sort_keys=True)
    failed = []
    for finding in run_check(EncoderSpec(name, weights, arguments, precision), device_of_worker()):
        mark = {True: "ok", False: "FAILED", None: "unproven"}[finding.passed]
        click.echo(f"{mark:<9} {finding.subject}: {finding.words}")
        failed += [finding.subject] if finding.passed is False else []
    if failed:
        raise UserError(f"The encoder {name} fails in {', '.join(failed)}; don't extract with it.")
