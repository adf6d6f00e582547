"""The command line: puts the commands together, and turns errors into one sentence and an exit code."""

from __future__ import annotations

import getpass
import os
from pathlib import Path
from typing import Any

import click

from nestgen.cli import sampling, scoring, sharing, training
from nestgen.errors import LostProcess, UserError, interrupt_of
from nestgen.memory import keep_freed_memory
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
        except (Exception, KeyboardInterrupt) as error:
            if (interrupt := interrupt_of(error)) is not None:
                sentence, code = str(interrupt) or "interrupted", 130
            elif isinstance(error, MemoryError) or _is_full(error):
                sentence, code = (
                    "error: memory is full; give a smaller batch, or fewer images, or a smaller denoiser",
                    1,
                )
            else:
                raise
        click.echo(sentence, err=True)
        return ctx.exit(code)


def _is_full(error: Exception | KeyboardInterrupt) -> bool:
    """Whether torch raised it for memory that ran out, of the machine or of a GPU."""
    words = ("DefaultCPUAllocator", "out of memory")
    return isinstance(error, RuntimeError) and any(one in str(error) for one in words)


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
