"""Versions of installed libraries, each looked up once a process: a look parses all of a package's metadata, for 9 ms."""

from __future__ import annotations

import importlib.metadata
from functools import cache


@cache
def version(library: str) -> str:
    """As the installed package says. Raises importlib.metadata.PackageNotFoundError where it is not there."""
    return importlib.metadata.version(library)
