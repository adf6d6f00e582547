"""The command `nestgen`, and `python -m nestgen`: Ctrl-C while it is being imported, too, is one sentence."""

import sys

from nestgen.errors import noticing_interrupts


def main() -> None:
    """Imports the command line and runs it."""
    with noticing_interrupts() as came:
        try:
            from nestgen.cli.main import main as run
        except (Exception, KeyboardInterrupt):
            if not came:
                raise
            print("interrupted before anything began", file=sys.stderr)
            sys.exit(130)
    run(prog_name="nestgen")


if __name__ == "__main__":
    main()
