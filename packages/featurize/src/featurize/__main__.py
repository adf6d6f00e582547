"""The command `featurize`, and `python -m featurize`: Ctrl-C while it is being imported, too, is one sentence."""

import sys

from featurize.errors import interrupt_of


def main() -> None:
    """Imports the command line and runs it."""
    try:
        from featurize.cli.main import main as run
    except (Exception, KeyboardInterrupt) as error:
        if interrupt_of(error) is None:
            raise
        print("interrupted before anything began", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
