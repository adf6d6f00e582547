"""`python -m featurize`: the command where its script is not on the path."""

from featurize.cli.main import main

if __name__ == "__main__":
    main()
