"""Writes the pages of results: `python pipelines/results.py [RECIPE]...`, see workflow/results.py."""

from workflow.results import main

if __name__ == "__main__":
    main()
