"""A cheap sign that a source is as it was when a ledger was made of it, without listing it again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path

KINDS = (
    "scenes",
    "wds",
)  # all that is listed of them comes from the files of the pictures; elsewhere are annotations beside
LEVELS = 3  # of folders above a file: a file or a class that comes or goes changes the time of one of them


def stamp(asked: Sequence[object], places: Iterable[str]) -> str | None:
    """SHA-256 over what was asked for and the sizes and times of the files at `places` and of the folders above them.

    `asked` starts with the SOURCE. None where it can't be told: for remote places, and for kinds of source that have
    annotations in further files. Drawn pictures depend on this package's code alone.
    """
    found = set(places)
    if str(asked[0]).partition(":")[0] not in KINDS or any("://" in place for place in found):
        return None
    drawn = {place for place in found if place.startswith("scenes:")}
    if drawn:
        found = (found - drawn) | {str(path) for path in Path(str(files("featurize"))).glob("scenes/*.py")}
    above: set[str] = set()
    for place in found:
        for _ in range(LEVELS):
            place = os.path.dirname(place)
            if place in above or len(place) < 2:
                break
            above.add(place)
    digest = hashlib.sha256(json.dumps(asked).encode())
    for place in sorted(found | above):
        try:
            status = os.stat(place)
        except OSError:
            return None
        size = 0 if place in above else status.st_size
        digest.update(f"{place}\0{size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
