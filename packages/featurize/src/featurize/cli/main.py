"""The command `featurize`: its subcommands, and errors as one sentence with an exit code."""

from __future__ import annotations

import getpass
import logging
import os
import sys

import click

from featurize.cli import encoders, extraction, neighbours, scenes, stores
from featurize.errors import Interrupted, UserError, explain_memory_error, explain_os_error, noticing_interrupts
from featurize.recipe import DEFAULT_RECIPE, read_request
from featurize.versions import DISTRIBUTION


@click.group(
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name=DISTRIBUTION)
@click.pass_context
def commands(context: click.Context) -> None:
    """Images through a frozen encoder into standardised per-level zarr stores.

    Without a command, in a folder with a recipe nested.yaml, it says what of the stores is there and what comes next.

    Example: featurize extract folder:photos --levels 4x4x16 --out stores/photos
    """
    if context.invoked_subcommand is not None:
        return
    if not DEFAULT_RECIPE.is_file():
        click.echo(context.get_help())
        return
    from featurize.reports.status import status

    click.echo(status(read_request(None, {}, None)))


for command in (
    scenes.scenes,
    encoders.encoders,
    encoders.check_encoder,
    extraction.plan,
    extraction.extract,
    extraction.levels,
    extraction.embed_text,
    stores.info,
    stores.ls,
    stores.images,
    stores.verify,
    stores.repair,
    neighbours.knn_viz,
):
    commands.add_command(command)


def main() -> None:
    """Entry point: 0 done, 1 for an error of the input or the machine, 2 for a wrong command line, 130 interrupted."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("featurize").setLevel(logging.INFO)
    _name_the_user()
    try:
        with noticing_interrupts() as came:
            commands(standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        if came or isinstance(error, KeyboardInterrupt | click.Abort):
            # click turns what an extraction raises into Abort, and keeps it as the cause.
            states = (str(raised) for raised in (error, error.__cause__) if isinstance(raised, Interrupted))
            state = next(states, "interrupted: what is written is kept; run the same command again to go on.")
            click.echo(f"\n{state}", err=True)
            sys.exit(130)
        if isinstance(error, click.ClickException):
            error.show()
            sys.exit(error.exit_code)
        explained = explain_os_error(error) if isinstance(error, OSError) else explain_memory_error(error)
        sentence = error if isinstance(error, UserError) else explained
        if sentence is None:
            raise
        click.echo(f"error: {sentence}", err=True)
        sys.exit(1)


def _name_the_user() -> None:
    """torch asks for the user's name as it is imported. In a container the user's number may have none."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = str(os.getuid())


if __name__ == "__main__":
    main()
