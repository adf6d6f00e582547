"""All store roots below a folder: what they hold, how large it is, in what state, and what made it."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from featurize.errors import UserError
from featurize.io.lock import holder
from featurize.store.layout import (
    blocks_folder,
    is_sealed,
    list_arrays,
    list_roots,
    seal_path,
    shape_name,
    written_blocks,
)
from featurize.store.ledger import read_ledger
from featurize.store.metadata import read_metadata, spec_of
from featurize.store.seal import read_seal

COLUMNS = ("array", "shape", "size", "state", "made with")


def list_stores(folder: Path) -> str:
    """Lines about every store root at or below `folder`, then about each of its arrays. Raises UserError when there is none."""
    roots = list_roots(folder)
    if not roots:
        raise UserError(f"{folder} holds no store root (no rows.parquet); `featurize extract --out DIR` makes one.")
    return "\n\n".join(_describe(root) for root in roots)


def _describe(root: Path) -> str:
    try:
        ledger = read_ledger(root)
    except UserError as error:
        return f"{root}: {error}"
    lines = [_line(path, root) for path in list_arrays(root)]
    total = sum(size for size, _ in lines)
    lock = holder(root)
    head = f"{root}: {ledger.rows:,} rows of {ledger.source}, {ledger.refused:,} refused, {_size(total)}"
    table = [COLUMNS, *(cells for _, cells in lines)]
    widths = [max(len(row[column]) for row in table) for column in range(len(COLUMNS))]
    rows = ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
    return "\n".join([head + (f"; {lock}" if lock else ""), *rows])


def _line(path: Path, root: Path) -> tuple[int, tuple[str, ...]]:
    """(bytes, the cells of an array's line)."""
    name = path.relative_to(root).as_posix()
    try:
        metadata = read_metadata(path)
        spec = spec_of(path, metadata)
        versions = metadata.attributes["versions"]
        digest = str(read_seal(path)["sha256"]) if is_sealed(path) else None
    except (UserError, OSError, KeyError):
        return 0, (name, "", "", "damaged; see `featurize verify`", "")
    written = len(written_blocks(path)) if digest is None else spec.blocks
    size = int(metadata.nbytes * written / spec.blocks)
    if digest is not None:
        when = datetime.fromtimestamp(seal_path(path).stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M")
        state = f"sealed {digest[:12]} {when}"
    elif blocks_folder(path).exists():
        state = f"unfinished, {written} of {spec.blocks} blocks"
    else:
        state = "no seal; see `featurize verify`"
    cells = (
        name,
        shape_name(spec.shape),
        _size(size),
        state,
        f"{_maker(spec.provenance)}featurize {versions['featurize']}",
    )
    return size, cells


def _maker(provenance: dict[str, Any]) -> str:
    network = provenance.get("encoder") or provenance.get("codec") or {}
    weights = str(network.get("weights_sha256", ""))[:12]
    return f"{network['name']}{f' {weights}' if weights else ''}, " if "name" in network else ""


def _size(size: float) -> str:
    power = min(4, int(math.log10(max(size, 1)) / 3))
    return f"{size / 1000**power:,.{min(power, 1)}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
