"""A cheap sign that a source has not changed since a ledger was made of it, without listing it again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path

KINDS = ("scenes", "wds")  # whose listing comes from the images' own files; the others have annotations beside them
LEVELS = 3  # of folders above a file: a file or a class that comes or goes changes the time of one of them


def change_stamp(request: Sequence[object], addresses: Iterable[str]) -> str | None:
    """SHA-256 over the request and the sizes and times of the files at `addresses` and of the folders above them.

    `request` starts with the SOURCE. None where it can't be known: for remote addresses, and for kinds of source that have
    annotations in further files. Drawn images depend on this package's code alone.
    """
    paths = set(addresses)
    if str(request[0]).partition(":")[0] not in KINDS or any("://" in path for path in paths):
        return None
    drawn = {path for path in paths if path.startswith("scenes:")}
    if drawn:
        paths = (paths - drawn) | {str(path) for path in Path(str(files("featurize"))).glob("scenes/*.py")}
    above: set[str] = set()
    for path in paths:
        for _ in range(LEVELS):
            path = os.path.dirname(path)
            if path in above or len(path) < 2:
                break
            above.add(path)
    digest = hashlib.sha256(json.dumps(request).encode())
    for path in sorted(paths | above):
        try:
            status = os.stat(path)
        except OSError:
            return None
        # A file that was put in another's place may have its size and time, but was changed later.
        own = "" if path in above else f"{status.st_size}\0{status.st_ctime_ns}"
        digest.update(f"{path}\0{own}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
