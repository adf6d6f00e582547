"""The command line: puts the commands together, and turns errors into one sentence and an exit code."""

from __future__ import annotations

import getpass
import os
from pathlib import Path
from typing import Any

import click

from nestgen.cli import sampling, scoring, sharing, training
from nestgen.errors import LostProcess, UserError, noticing_interrupts
from nestgen.memory import keep_freed_memory
from nestgen.training.launch import LOST


class Commands(click.Group):
    """A group whose commands end with `error: <sentence>` and exit code 1, or 130 when interrupted."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        try:
            with noticing_interrupts() as came:
                return super().invoke(ctx)
        except click.exceptions.Exit:
            raise
        except (Exception, KeyboardInterrupt) as error:
            if came or isinstance(error, KeyboardInterrupt):
                sentence, code = (str(error) if isinstance(error, KeyboardInterrupt) else "") or "interrupted", 130
            elif (explained := _explain(error)) is not None:
                sentence, code = f"error: {explained}", LOST if isinstance(error, LostProcess) else 1
            else:
                raise
        click.echo(sentence, err=True)
        return ctx.exit(code)


def _explain(error: Exception) -> str | None:
    """The sentence for an error that a user can mend; None for any other."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):  # no space, no permission: the sentence is the system's
        return f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}"
    of_torch = isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("DefaultCPUAllocator", "out of memory")
    )
    if isinstance(error, MemoryError) or of_torch:
        return "memory is full; give a smaller batch, or fewer images, or a smaller denoiser"
    return None


@click.group(
    cls=Commands,
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="nestgen")
@click.pass_context
def main(context: click.Context) -> None:
    """Trains one denoiser per level of a hierarchy of stored latents, and samples from the top down.

    Without a command, in a folder with a recipe nested.yaml, it says where the experiment stands and what comes next.

    Example: nestgen sample --pretrained scenes --count 64 --out samples
    """
    _name_the_user()
    if context.invoked_subcommand is not None:
        keep_freed_memory()
        return
    if not Path("nested.yaml").is_file():
        click.echo(context.get_help())
        return
    from nestgen.cli.status import status
    from nestgen.recipe.recipe import load_recipe

    click.echo(status(load_recipe()))


def _name_the_user() -> None:
    """torch asks for the user's name as it is imported. In a container the user's number may have none."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = str(os.getuid())


for command in (
    training.info,
    training.train,
    training.ema,
    sampling.sample,
    sampling.hierarchy,
    sampling.sheet,
    sampling.decode,
    sharing.export,
    sharing.explore,
    scoring.evaluate,
    scoring.diagnose,
    scoring.nearest,
    scoring.compare,
):
    main.add_command(command)
