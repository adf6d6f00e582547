"""Writes the report of an experiment: `python pipelines/report.py CELL... --runs DIR --out FILE`, see workflow/report.py."""

from workflow.report import main

if __name__ == "__main__":
    main()
