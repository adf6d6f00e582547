"""The images of a store as files: each as the square that its encoder saw."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from featurize.io.files import atomic_write
from featurize.neighbours.pixels import thumbnail
from featurize.store.ledger import read_ledger


def write_images(root: Path, out: Path, count: int, side: int) -> int:
    """Write rows 0 to `count` - 1 of a store root as OUT/000000.png, ..., `side` pixels a side; how many there are.

    The images are read from their source again. Raises UserError for a root without a ledger, and for images that are gone.
    """
    ledger = read_ledger(root)
    rows = range(min(count, ledger.rows))
    for row in rows:
        with atomic_write(out / f"{row:06d}.png") as draft:
            Image.fromarray(thumbnail(ledger, row, side)).save(draft, format="PNG")
    return len(rows)
