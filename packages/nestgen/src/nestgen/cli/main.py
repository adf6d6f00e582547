"""The command line: puts the commands together, and turns errors into one sentence and an exit code."""

from __future__ import annotations

from typing import Any

import click

from nestgen.cli import sampling, scoring, sharing, training
from nestgen.errors import LostProcess, UserError
from nestgen.training.launch import LOST


class Commands(click.Group):
    """A group whose commands end with `error: <sentence>` and exit code 1, or 130 when interrupted."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            sentence, code = f"error: {error}", LOST if isinstance(error, LostProcess) else 1
        except OSError as error:  # no space, no permission: the sentence is the system's
            where = f"{error.filename}: " if error.filename else ""
            sentence, code = f"error: {where}{error.strerror or error}", 1
        except KeyboardInterrupt as interrupt:
            sentence, code = str(interrupt) or "interrupted", 130
        click.echo(sentence, err=True)
        return ctx.exit(code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="nestgen")
def main() -> None:
    """Trains one denoiser per level of a hierarchy of stored latents, and samples from the top down."""


for command in (
    training.info,
    training.train,
    training.ema,
    sampling.sample,
    sampling.hierarchy,
    sampling.sheet,
    sharing.export,
    sharing.explore,
    scoring.evaluate,
    scoring.diagnose,
    scoring.nearest,
    scoring.compare,
):
    main.add_command(command)
