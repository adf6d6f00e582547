"""Whether an extraction will fit the disk, before it writes for hours."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np

from featurize.errors import UserError
from featurize.extraction.targets import Targets
from featurize.io.files import is_local
from featurize.store.layout import is_sealed, level_path, written_blocks
from featurize.store.metadata import ArraySpec

GIGABYTE = 1 << 30


def check_space(targets: Targets, root: Path) -> None:
    """Raises UserError where a local disk has less room than the blocks that are still to be written take.

    Stores are written uncompressed, so their size is known; `featurize plan` prints it.
    """
    if not is_local(root):
        return
    here = next(folder for folder in (root, *root.parents) if folder.is_dir())
    needed, free = bytes_to_write(targets), shutil.disk_usage(here).free
    if needed > free:
        raise UserError(
            f"{root} needs {needed / GIGABYTE:.3g} GiB more, and its disk has {free / GIGABYTE:.3g} GiB left; free some, or "
            "give --out on another disk."
        )


def bytes_to_write(targets: Targets) -> int:
    """Bytes of all blocks and levels that are not there yet."""
    base = targets.base
    rows_and_views = base.shape[:2]
    folder = base.path.parent
    levels = [shape for shape in targets.levels if not is_sealed(level_path(folder, shape))]
    half = np.dtype(np.float16).itemsize
    return sum(map(_missing, targets.written)) + sum(half * math.prod((*rows_and_views, *shape)) for shape in levels)


def _missing(spec: ArraySpec) -> int:
    blocks = 0 if is_sealed(spec.path) else spec.blocks - len(written_blocks(spec.path))
    return min(blocks * spec.bytes_per_block, math.prod(spec.shape) * np.dtype(spec.dtype).itemsize)
