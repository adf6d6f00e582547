"""A line for each picture of a source: it is decoded once and gets a row, or the reason why it has none."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from featurize.errors import UserError
from featurize.execution.engine import Run, decoding_threads, in_order
from featurize.images.crop import CropRule
from featurize.images.decode import BadImage, decode_with_mode
from featurize.io.files import atomic_write
from featurize.sources import SourceImage, read

PER_TASK = 256  # pictures
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("key", pa.string()),
        ("source", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("label", pa.int64()),
        ("captions", pa.list_(pa.string())),
        ("sha256", pa.string()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("mode", pa.string()),
        ("box", pa.list_(pa.float64())),
    ]
)


@dataclass(frozen=True)
class _Seen:
    reason: str = ""
    sha256: str = ""
    width: int | None = None
    height: int | None = None
    mode: str | None = None


def draft_path(root: Path) -> Path:
    """The ledger of a run that --max-bad stopped, as far as it came."""
    return root / "rows.draft.parquet"


def look_at_all(root: Path, pictures: Sequence[SourceImage], crop: CropRule, max_bad: int | str, run: Run) -> pa.Table:
    """A line for each picture, all of them decoded. Raises UserError for more refused ones than `max_bad`."""
    parts = [range(start, min(start + PER_TASK, len(pictures))) for start in range(0, len(pictures), PER_TASK)]
    lines: list[pa.RecordBatch] = []
    keys: set[str] = set()
    row = bad = 0
    with tqdm(total=len(pictures), desc="reading pictures", unit=" pictures", smoothing=0.1) as progress:
        looks = in_order(run(_look_at, (pictures[part.start : part.stop] for part in parts)))
        for part, seen in zip(parts, looks):
            lines.append(_lines(pictures[part.start : part.stop], seen, crop, keys, row))
            row += len(part) - lines[-1]["row"].null_count
            bad += sum(bool(look.reason) for look in seen)
            progress.update(len(part))
            progress.set_postfix_str(f"{bad} refused", refresh=False)
            if bad > allowed_bad(max_bad, len(pictures)):
                break
    table = pa.Table.from_batches(lines, SCHEMA)
    _check_bad(root, table, len(pictures), max_bad)
    return table


def allowed_bad(max_bad: int | str, pictures: int) -> int:
    """How many of so many pictures may be refused by `--max-bad`: a count, or a share like `1%` rounded down."""
    return int(Decimal(max_bad.rstrip("%")) * pictures / 100) if isinstance(max_bad, str) else max_bad


def _look_at(pictures: Sequence[SourceImage]) -> list[_Seen]:
    threads = decoding_threads()
    if not threads:
        return [_look_at_one(picture) for picture in pictures]
    with ThreadPoolExecutor(threads) as pool:  # beside a GPU there are fewer workers than cores
        return list(pool.map(_look_at_one, pictures))


def _look_at_one(picture: SourceImage) -> _Seen:
    try:
        data = read(picture)
        image, mode = decode_with_mode(data)
    except BadImage as error:
        return _Seen(reason=str(error))
    except FileNotFoundError:
        return _Seen(reason="the file is not there")
    except PermissionError:
        return _Seen(reason="the file may not be read: permission is denied")
    return _Seen("", hashlib.sha256(data).hexdigest(), image.width, image.height, mode)


def _lines(
    pictures: Sequence[SourceImage], seen: Sequence[_Seen], crop: CropRule, keys: set[str], row: int
) -> pa.RecordBatch:
    """The lines of some pictures, the first stored one being `row`; `keys` are those seen before and get these too."""
    lines: list[dict[str, Any]] = []
    for picture, look in zip(pictures, seen, strict=True):
        reason = look.reason or ("an earlier picture has the same key" if picture.key in keys else "")
        keys.add(picture.key)
        box = list(crop.box(look.width, look.height)) if look.width and look.height else None
        lines.append(
            {
                "row": None if reason else row,
                "key": picture.key,
                "source": picture.source,
                "offset": picture.offset,
                "size": picture.size,
                "status": "refused" if reason else "ok",
                "reason": reason,
                "label": picture.label,
                "captions": list(picture.captions),
                "sha256": look.sha256,
                "width": look.width,
                "height": look.height,
                "mode": look.mode,
                "box": box,
            }
        )
        row += not reason
    return pa.RecordBatch.from_pylist(lines, schema=SCHEMA)


def _check_bad(root: Path, table: pa.Table, total: int, max_bad: int | str) -> None:
    """Raises UserError for too many refused pictures, with the reasons summed up and the lines left in a draft."""
    refused = [line for line in table.select(["key", "status", "reason"]).to_pylist() if line["status"] == "refused"]
    none_left = len(refused) == len(table) == total
    if not none_left and len(refused) <= allowed_bad(max_bad, total):
        return
    with atomic_write(draft_path(root)) as temporary:
        pq.write_table(table, temporary)
    of = f"{total}" if len(table) == total else f"the first {len(table)}"
    found = (
        f"None of the {total} pictures can be read" if none_left else f"{len(refused)} of {of} pictures can't be read"
    )
    allowed = "" if none_left else f", more than --max-bad {max_bad} allows"
    mend = "check SOURCE" if none_left else "mend them or raise --max-bad"
    raise UserError(f"{found}{allowed}: {_summed_up(refused)}; {draft_path(root)} has a line for each; {mend}.")


def _summed_up(refused: Sequence[dict[str, str]]) -> str:
    """The commonest reasons with how often and where first; numbers in them do not make two of one reason."""
    kinds = [re.sub(r"\d+", "N", line["reason"]) for line in refused]
    common = [
        f"{count} times '{refused[kinds.index(kind)]['reason']}' (first: {refused[kinds.index(kind)]['key']})"
        for kind, count in Counter(kinds).most_common(3)
    ]
    rest = len(set(kinds)) - len(common)
    return "; ".join(common) + (f"; and {rest} other reasons" if rest else "")
