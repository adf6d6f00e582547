"""The images of a store as files: each as the square that its encoder saw."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from featurize.images.decode import Profile
from featurize.io.files import atomic_write
from featurize.neighbours.pixels import profile_of, thumbnail
from featurize.store.layout import list_bases
from featurize.store.ledger import read_ledger


def write_images(root: Path, out: Path, count: int, side: int) -> int:
    """Write rows 0 to `count` - 1 of a store root as OUT/000000.png, ..., `side` pixels a side; how many there are.

    The images are read from their source again. Raises UserError for a root without a ledger, and for images that are gone or
    have changed.
    """
    ledger = read_ledger(root)
    icc: Profile = next(map(profile_of, list_bases(root)), "ignore")
    rows = range(min(count, ledger.rows))
    for row in rows:
        with atomic_write(out / f"{row:06d}.png") as draft:
            Image.fromarray(thumbnail(ledger, row, side, icc)).save(draft, format="PNG")
    return len(rows)
