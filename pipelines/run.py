"""Runs a recipe: `python pipelines/run.py RECIPE --directory DIR [OPTION]... [--config KEY=VALUE...]`, see workflow/run.py."""

from workflow.run import main

if __name__ == "__main__":
    main()
