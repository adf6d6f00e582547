"""The ledger `rows.parquet`: every picture of the source has one row, or the reason why it has none."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from featurize.engine import Run, in_order
from featurize.errors import UserError
from featurize.files import replacing
from featurize.pictures import SQUARE, BadPicture, Box, CropRule, decode_with_mode
from featurize.sources import Listing, Picture, read
from featurize.sources.stamp import stamp
from featurize.store import FORMAT

T = TypeVar("T")

log = logging.getLogger(__name__)

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
class Ledger:
    """The stored rows of a root, in order, and what the root was made from.

    The lines stay in an Arrow table: as Python objects a million of them would take gigabytes.
    """

    source: str
    crop: str  # the rule that made the boxes
    table: pa.Table
    refused: int

    @property
    def rows(self) -> int:
        return len(self.table)

    @cached_property
    def keys(self) -> list[str]:
        """The key of each row."""
        return self.table["key"].to_pylist()

    @cached_property
    def keys_sha256(self) -> str:
        """SHA-256 of the keys, each followed by a newline."""
        return _digest(self.table["key"], "\n")

    @cached_property
    def pictures_sha256(self) -> str:
        """SHA-256 over the pictures' digests."""
        return _digest(self.table["sha256"], "")

    @cached_property
    def labels_sha256(self) -> str:
        """SHA-256 of the labels' bytes."""
        return hashlib.sha256(self.labels.tobytes()).hexdigest()

    @cached_property
    def captions_sha256(self) -> str:
        """SHA-256 of the list of all captions, row by row, as JSON."""
        return captions_digest([caption for own in self.table["captions"].to_pylist() for caption in own])

    def differences(self, provenance: dict[str, Any]) -> list[str]:
        """Which digests of this ledger are others than the provenance of an array says."""
        names = ("pictures_sha256", "labels_sha256", "captions_sha256")
        return [name for name in names if name in provenance and provenance[name] != getattr(self, name)]

    @property
    def labels(self) -> np.ndarray:
        """(rows,) int64, -1 where a picture has none."""
        return pc.fill_null(self.table["label"], -1).to_numpy().astype(np.int64)

    @property
    def pictures(self) -> Lines[Picture]:
        """The picture of each row."""
        return Lines(self.table, _picture)

    @property
    def boxes(self) -> Lines[Box]:
        """The crop of each row."""
        return Lines(self.table, lambda line: tuple(line["box"]))

    def part(self, rows: range | list[int]) -> tuple[tuple[Picture, ...], tuple[Box, ...], tuple[str, ...]]:
        """Pictures, boxes and digests of some rows."""
        lines = self.table.take(list(rows)).to_pylist()
        return (
            tuple(_picture(line) for line in lines),
            tuple(tuple(line["box"]) for line in lines),
            tuple(line["sha256"] for line in lines),
        )


class Lines(Sequence[T]):
    """The lines of a table, each made an object when it is asked for."""

    def __init__(self, table: pa.Table, make: Callable[[dict[str, Any]], T]) -> None:
        self._table, self._make = table, make

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[index] for index in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        return self._make(self._table.slice(int(row) % len(self), 1).to_pylist()[0])

    def __iter__(self) -> Iterator[T]:
        for batch in self._table.to_batches(max_chunksize=PER_TASK):
            yield from map(self._make, batch.to_pylist())


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


def unchanged_ledger(root: Path, asked: Sequence[object]) -> Ledger | None:
    """The ledger of a root, where it can be told without listing the source that nothing has changed; else None."""
    path = ledger_path(root)
    if not path.is_file():
        return None
    made_of = _metadata(path).get("stamp")
    if not made_of or stamp(asked, pc.unique(_table_of(path, ["source"])["source"]).to_pylist()) != made_of:
        return None
    return read_ledger(root)


def known_ledger(root: Path, listing: Listing) -> Ledger | None:
    """The ledger of a root that was made of this very listing; None where there is none, or another."""
    path = ledger_path(root)
    if path.is_file() and _metadata(path).get("listing_sha256") == listing.sha256:
        return read_ledger(root)
    return None


def make_ledger(
    root: Path,
    source: str,
    listing: Listing,
    crop: CropRule,
    max_bad: int | str,
    run: Run,
    asked: Sequence[object] | None = None,
) -> Ledger:
    """Decode every picture once and write the ledger, or take the one that is there.

    A picture that can't be decoded is refused with its reason. More than `max_bad` of them (a count, or a share like
    `1%`) is an error, raised as soon as it is certain; so is a ledger of other pictures. `asked` is what the listing is the
    answer to.
    """
    path = ledger_path(root)
    listed = listing.sha256
    old = _metadata(path) if path.exists() else None
    if old is not None:
        check_crop(root, old.get("crop", str(SQUARE)), crop)
        if old.get("listing_sha256") == listed:
            return read_ledger(root)
        if _all_keys(path) != [picture.key for picture in listing.pictures]:
            raise _other_pictures(root, old)
        log.info("The pictures' files have other places or times than in %s; they are read again.", path)
    table = look_at_all(root, listing.pictures, crop, max_bad, run)
    if old is not None and not _same_rows(table, _table_of(path)):
        raise _other_pictures(root, old)
    ledger = ledger_of(table, source, str(crop))
    write_ledger(root, table, ledger, listing, asked)
    return ledger


def write_ledger(
    root: Path, table: pa.Table, ledger: Ledger, listing: Listing, asked: Sequence[object] | None = None
) -> None:
    """Write all lines of a ledger with what it was made of; its pages carry checksums, which reading compares."""
    metadata = {
        "format": FORMAT,
        "source": ledger.source,
        "crop": ledger.crop,
        "listing_sha256": listing.sha256,
        "stamp": (stamp(asked, {picture.source for picture in listing.pictures}) if asked else None) or "",
        "keys_sha256": ledger.keys_sha256,
    }
    with replacing(ledger_path(root)) as temporary:
        pq.write_table(table.replace_schema_metadata(metadata), temporary, write_page_checksum=True)
    draft_path(root).unlink(missing_ok=True)


def check_crop(root: Path, found: str, crop: CropRule) -> None:
    """Raises UserError where a root's boxes were made by another rule."""
    if found != str(crop):
        raise UserError(
            f"The pictures of {root} are cropped by the rule '{found}', not '{crop}', and a store root has one rule, so that all "
            "its grids agree; choose another --out, or the root's own --crop."
        )


def look_at_all(root: Path, pictures: Sequence[Picture], crop: CropRule, max_bad: int | str, run: Run) -> pa.Table:
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


def _other_pictures(root: Path, metadata: dict[str, str]) -> UserError:
    was = metadata.get("source", "an unknown source")
    return UserError(f"{root} already holds other pictures ({was}); choose another --out.")


def _all_keys(path: Path) -> list[str]:
    return _table_of(path, ["key"])["key"].to_pylist()


def _same_rows(first: pa.Table, second: pa.Table) -> bool:
    return all(first[name].equals(second[name]) for name in ("row", "key", "label", "captions", "sha256", "box"))


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
    metadata = _metadata(path)
    return ledger_of(_table_of(path), metadata.get("source", ""), metadata.get("crop", str(SQUARE)))


def _table_of(path: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        with path.open("rb") as file:
            return pq.read_table(file, columns=columns, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"The ledger {path} is damaged ({str(error).splitlines()[0]}); `featurize repair` makes it again."
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


def _lines(
    pictures: Sequence[Picture], seen: Sequence[_Seen], crop: CropRule, keys: set[str], row: int
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


def ledger_of(table: pa.Table, source: str, crop: str) -> Ledger:
    """The ledger of a table of all lines."""
    kept = table.filter(pc.is_valid(table["row"])) if table["row"].null_count else table
    return Ledger(source, crop, kept.combine_chunks(), refused=len(table) - len(kept))


def _picture(line: dict[str, Any]) -> Picture:
    return Picture(line["key"], line["source"], line["offset"], line["size"], line["label"], tuple(line["captions"]))


def captions_digest(captions: Sequence[str]) -> str:
    """SHA-256 of captions, or of prompts, as a JSON list."""
    return hashlib.sha256(json.dumps(list(captions)).encode()).hexdigest()


def _digest(column: pa.ChunkedArray, after_each: str) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(column), PER_TASK):
        digest.update("".join(f"{text}{after_each}" for text in column.slice(start, PER_TASK).to_pylist()).encode())
    return digest.hexdigest()


def _metadata(path: Path) -> dict[str, str]:
    try:
        with path.open("rb") as file:
            stored = pq.read_schema(file).metadata or {}
    except (pa.ArrowException, OSError):
        raise UserError(f"The ledger {path} is damaged; `featurize repair` makes it again.") from None
    return {key.decode(): value.decode() for key, value in stored.items()}
