"""The ledger `rows.parquet`: every picture of the source has one row, or the reason why it has none."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from featurize.engine import Run, in_order
from featurize.errors import UserError
from featurize.files import replacing
from featurize.pictures import BadPicture, Box, decode_with_mode, square_box
from featurize.sources import Listing, Picture, read
from featurize.store import FORMAT

PER_TASK = 256
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
        ("box", pa.list_(pa.int64())),
    ]
)


@dataclass(frozen=True)
class Ledger:
    """The stored rows of a root, in order, and what the root was made from."""

    source: str
    pictures: tuple[Picture, ...]
    boxes: tuple[Box, ...]
    sha256s: tuple[str, ...]
    refused: int

    @property
    def rows(self) -> int:
        return len(self.pictures)

    @property
    def keys_sha256(self) -> str:
        return hashlib.sha256("".join(f"{picture.key}\n" for picture in self.pictures).encode()).hexdigest()

    @property
    def pictures_sha256(self) -> str:
        return hashlib.sha256("".join(self.sha256s).encode()).hexdigest()

    @property
    def labels(self) -> np.ndarray:
        """(rows,) int64, -1 where a picture has none."""
        return np.array([-1 if picture.label is None else picture.label for picture in self.pictures], dtype=np.int64)


@dataclass(frozen=True)
class _Seen:
    reason: str = ""
    sha256: str = ""
    width: int | None = None
    height: int | None = None
    mode: str | None = None


def ledger_path(root: Path) -> Path:
    return root / "rows.parquet"


def draft_path(root: Path) -> Path:
    """The ledger of a run that --max-bad stopped, as far as it came."""
    return root / "rows.draft.parquet"


def make_ledger(root: Path, source: str, listing: Listing, max_bad: int | str, run: Run) -> Ledger:
    """Decode every picture once and write the ledger, or take the one that is there.

    A picture that can't be decoded is refused with its reason. More than `max_bad` of them (a count, or a share like
    `1%`) is an error, raised as soon as it is certain; so is a ledger of other pictures.
    """
    path = ledger_path(root)
    listed = _listing_sha256(listing.pictures)
    if path.exists():
        metadata = _metadata(path)
        if metadata.get("listing_sha256") != listed:
            raise UserError(
                f"{root} already holds other pictures ({metadata.get('source', 'an unknown source')}); choose another --out."
            )
        return read_ledger(root)
    parts = [listing.pictures[start : start + PER_TASK] for start in range(0, len(listing.pictures), PER_TASK)]
    seen: list[_Seen] = []
    bad = 0
    with tqdm(total=len(listing.pictures), desc="reading pictures", unit=" pictures", smoothing=0.1) as progress:
        for part in in_order(run(_look_at, parts)):
            seen += part
            bad += sum(bool(look.reason) for look in part)
            progress.update(len(part))
            if bad > allowed_bad(max_bad, len(listing.pictures)):
                break
    table = _table(listing.pictures[: len(seen)], seen)
    _check_bad(root, table, len(listing.pictures), max_bad)
    metadata = {
        "format": FORMAT,
        "source": source,
        "listing_sha256": listed,
        "keys_sha256": _from_table(table, source).keys_sha256,
    }
    with replacing(path) as temporary:
        pq.write_table(table.replace_schema_metadata(metadata), temporary)
    draft_path(root).unlink(missing_ok=True)
    return read_ledger(root)


def allowed_bad(max_bad: int | str, pictures: int) -> int:
    """How many of so many pictures may be refused by `--max-bad`: a count, or a share like `1%` rounded down."""
    return int(Decimal(max_bad.rstrip("%")) * pictures / 100) if isinstance(max_bad, str) else max_bad


def read_ledger(root: Path) -> Ledger:
    """The ledger of a store root. Raises UserError when there is none."""
    path = ledger_path(root)
    if not path.is_file():
        raise UserError(
            f"{root} is no store root (it has no rows.parquet); `featurize extract --out {root}` makes one."
        )
    try:
        return _from_table(pq.read_table(path), _metadata(path).get("source", ""))
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"The ledger {path} is damaged ({str(error).splitlines()[0]}); remove it and extract again."
        ) from None


def _look_at(pictures: Sequence[Picture]) -> list[_Seen]:
    return [_look_at_one(picture) for picture in pictures]


def _look_at_one(picture: Picture) -> _Seen:
    try:
        data = read(picture)
        image, mode = decode_with_mode(data)
    except BadPicture as error:
        return _Seen(reason=str(error))
    except FileNotFoundError:
        return _Seen(reason="the file is not there")
    except PermissionError:
        return _Seen(reason="the file may not be read: permission is denied")
    return _Seen("", hashlib.sha256(data).hexdigest(), image.width, image.height, mode)


def _table(pictures: Sequence[Picture], seen: Sequence[_Seen]) -> pa.Table:
    lines: list[dict[str, Any]] = []
    keys: set[str] = set()
    row = 0
    for picture, look in zip(pictures, seen, strict=True):
        reason = look.reason or ("an earlier picture has the same key" if picture.key in keys else "")
        keys.add(picture.key)
        box = list(square_box(look.width, look.height)) if look.width and look.height else None
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
    return pa.Table.from_pylist(lines, schema=SCHEMA)


def _check_bad(root: Path, table: pa.Table, total: int, max_bad: int | str) -> None:
    """Raises UserError for too many refused pictures, with the reasons summed up and the lines left in a draft."""
    refused = [line for line in table.select(["key", "status", "reason"]).to_pylist() if line["status"] == "refused"]
    none_left = len(refused) == len(table) == total
    if not none_left and len(refused) <= allowed_bad(max_bad, total):
        return
    with replacing(draft_path(root)) as temporary:
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


def _from_table(table: pa.Table, source: str) -> Ledger:
    lines = table.to_pylist()
    kept = [line for line in lines if line["row"] is not None]
    return Ledger(
        source=source,
        pictures=tuple(
            Picture(
                line["key"],
                line["source"],
                line["offset"],
                line["size"],
                line["label"],
                tuple(line["captions"]),
            )
            for line in kept
        ),
        boxes=tuple(tuple(line["box"]) for line in kept),
        sha256s=tuple(line["sha256"] for line in kept),
        refused=len(lines) - len(kept),
    )


def _metadata(path: Path) -> dict[str, str]:
    try:
        stored = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError):
        raise UserError(f"The ledger {path} is damaged; remove it and extract again.") from None
    return {key.decode(): value.decode() for key, value in stored.items()}


def _listing_sha256(pictures: Sequence[Picture]) -> str:
    """Digest of what was listed and of the files' versions: the same files need no second look."""
    digest = hashlib.sha256()
    for p in pictures:
        digest.update(json.dumps([p.key, p.source, p.offset, p.size, p.label, p.captions, p.version]).encode())
    return digest.hexdigest()
