"""Versions of installed libraries, each read once per process: reading one parses all of a package's metadata, for 9 ms."""

from __future__ import annotations

import importlib.metadata
from functools import cache


@cache
def version(library: str) -> str:
    """The version in the installed package's metadata. Raises importlib.metadata.PackageNotFoundError without one."""
    return importlib.metadata.version(library)
