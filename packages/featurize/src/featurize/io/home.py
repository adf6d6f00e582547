"""The user's home folder, which a container without HOME and passwd entry does not have."""

from __future__ import annotations

import os
from pathlib import Path

from featurize.errors import UserError


def expand_home(path: str | Path) -> Path:
    """The path with a leading `~` or `~user` replaced. Raises UserError where there is no such home folder."""
    if not str(path).startswith("~"):
        return Path(path)
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path} can't be found, because the home folder is not known; set HOME.") from None


def cache_folder() -> Path:
    """The folder of files that can be made again: `FEATURIZE_CACHE`, else `featurize` in the user's cache folder."""
    own = os.environ.get("FEATURIZE_CACHE")
    if own:
        return expand_home(own)
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "featurize"
    try:
        return expand_home("~/.cache/featurize")
    except UserError:
        raise UserError("There is no home folder to cache files in; set FEATURIZE_CACHE to a folder.") from None
