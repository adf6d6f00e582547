"""Where the command `featurize` is: the two packages share files only, and nestgen runs it for what it cannot do itself."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def find_featurize() -> str | None:
    """The command's path: beside this Python, or on the PATH; None where it is not installed."""
    beside = Path(sys.executable).with_name("featurize")
    return str(beside) if beside.is_file() else shutil.which("featurize")
