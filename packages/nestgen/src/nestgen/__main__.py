"""The command `nestgen`, and `python -m nestgen`: Ctrl-C while it is being imported, too, is one sentence."""

import sys

from nestgen.errors import interrupt_of


def main() -> None:
    """Imports the command line and runs it."""
    try:
        from nestgen.cli.main import main as run
    except (Exception, KeyboardInterrupt) as error:
        if interrupt_of(error) is None:
            raise
        print("interrupted before anything began", file=sys.stderr)
        sys.exit(130)
    run(prog_name="nestgen")


if __name__ == "__main__":
    main()
