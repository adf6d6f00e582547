"""The ledger `rows.parquet`: every picture of the source has one row, or the reason why it has none."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featurize.errors import UserError
from featurize.execution.engine import Run
from featurize.extraction.scan import PER_TASK, draft_path, look_at_all
from featurize.images.decode import SQUARE, Box, CropRule
from featurize.io.files import replacing
from featurize.sources import Listing, Picture
from featurize.sources.change_stamp import stamp
from featurize.store.store import FORMAT

T = TypeVar("T")

log = logging.getLogger(__name__)


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


def ledger_path(root: Path) -> Path:
    return root / "rows.parquet"


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


def _other_pictures(root: Path, metadata: dict[str, str]) -> UserError:
    was = metadata.get("source", "an unknown source")
    return UserError(f"{root} already holds other pictures ({was}); choose another --out.")


def _all_keys(path: Path) -> list[str]:
    return _table_of(path, ["key"])["key"].to_pylist()


def _same_rows(first: pa.Table, second: pa.Table) -> bool:
    return all(first[name].equals(second[name]) for name in ("row", "key", "label", "captions", "sha256", "box"))


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
