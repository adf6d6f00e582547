"""Versions of installed libraries, each read once per process: reading one parses all of a package's metadata, for 9 ms."""

from __future__ import annotations

import importlib.metadata
from functools import cache

DISTRIBUTION = "nested-featurize"  # our own name on PyPI, where another project is called featurize


@cache
def version(library: str) -> str:
    """The version in the installed package's metadata. Raises importlib.metadata.PackageNotFoundError without one."""
    return importlib.metadata.version(DISTRIBUTION if library == "featurize" else library)
