"""All store roots below a folder: what they hold, how large it is, in what state, and what made it."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from featurize.errors import UserError
from featurize.integrity.verify import arrays_of
from featurize.io.files import read_json
from featurize.io.lock import holder
from featurize.store.ledger import read_ledger
from featurize.store.metadata import header_of
from featurize.store.store import blocks_folder, is_sealed, seal_path, spec_of, written_blocks

COLUMNS = ("array", "shape", "size", "state", "made with")


def catalogue(folder: Path) -> str:
    """Lines about every store root at or below `folder`, then about each of its arrays. Raises UserError when there is none."""
    roots = sorted({path.parent for pattern in ("", "*/", "*/*/") for path in folder.glob(f"{pattern}rows.parquet")})
    if not roots:
        raise UserError(
            f"There is no store root in {folder} (no rows.parquet); `featurize extract --out DIR` makes one."
        )
    return "\n\n".join(_describe(root) for root in roots)


def _describe(root: Path) -> str:
    try:
        ledger = read_ledger(root)
    except UserError as error:
        return f"{root}: {error}"
    lines = [_line(path, root) for path in arrays_of(root)]
    total = sum(size for size, _ in lines)
    held = holder(root)
    head = f"{root}: {ledger.rows:,} rows of {ledger.source}, {ledger.refused:,} refused, {_size(total)}"
    table = [COLUMNS, *(cells for _, cells in lines)]
    widths = [max(len(row[column]) for row in table) for column in range(len(COLUMNS))]
    rows = ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
    return "\n".join([head + (f"; {held}" if held else ""), *rows])


def _line(path: Path, root: Path) -> tuple[int, tuple[str, ...]]:
    """(bytes, the cells of an array's line)."""
    name = path.relative_to(root).as_posix()
    try:
        header = header_of(path)
        spec = spec_of(path, header)
        versions = header.attributes["versions"]
    except (UserError, OSError, KeyError):
        return 0, (name, "", "", "damaged; see `featurize verify`", "")
    written = spec.blocks if is_sealed(path) else len(written_blocks(path))
    size = int(header.nbytes * written / spec.blocks)
    if is_sealed(path):
        when = datetime.fromtimestamp(seal_path(path).stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M")
        state = f"sealed {str(read_json(seal_path(path))['sha256'])[:12]} {when}"
    elif blocks_folder(path).exists():
        state = f"unfinished, {written} of {spec.blocks} blocks"
    else:
        state = "no seal; see `featurize verify`"
    shape = "x".join(map(str, spec.shape))
    return size, (name, shape, _size(size), state, f"{_maker(spec.provenance)}featurize {versions['featurize']}")


def _maker(provenance: dict[str, Any]) -> str:
    made = provenance.get("encoder") or provenance.get("codec") or {}
    weights = str(made.get("weights_sha256", ""))[:12]
    return f"{made['name']}{f' {weights}' if weights else ''}, " if "name" in made else ""


def _size(size: float) -> str:
    power = min(4, int(math.log10(max(size, 1)) / 3))
    return f"{size / 1000**power:,.{min(power, 1)}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
