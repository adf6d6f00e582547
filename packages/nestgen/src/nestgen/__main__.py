"""The command `nestgen`, and `python -m nestgen`: Ctrl-C while it is being imported, too, is one sentence."""

import sys


def main() -> None:
    """Imports the command line and runs it."""
    try:
        from nestgen.cli.main import main as run
    except KeyboardInterrupt:
        print("interrupted before anything began", file=sys.stderr)
        sys.exit(130)
    run(prog_name="nestgen")


if __name__ == "__main__":
    main()
