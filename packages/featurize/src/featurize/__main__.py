"""The command `featurize`, and `python -m featurize`: Ctrl-C while it is being imported, too, is one sentence."""

import sys

from featurize.errors import noticing_interrupts


def main() -> None:
    """Imports the command line and runs it."""
    with noticing_interrupts() as came:
        try:
            from featurize.cli.main import main as run
        except (Exception, KeyboardInterrupt):
            if not came:
                raise
            print("interrupted before anything began", file=sys.stderr)
            sys.exit(130)
    run()


if __name__ == "__main__":
    main()
