"""The ledger `rows.parquet`: every image of the source has one row, or the reason why it has none."""

from __future__ import annotations

import hashlib
import json
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
from featurize.images.crop import SQUARE, Box
from featurize.io.files import atomic_write
from featurize.sources import Listing, SourceImage
from featurize.sources.change_stamp import change_stamp
from featurize.store.layout import draft_ledger_path, ledger_path
from featurize.store.metadata import FORMAT

T = TypeVar("T")

LINES_AT_ONCE = 256  # turned into Python objects
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
    classes: tuple[str, ...] = ()  # the name of each label, where labels have names

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
    def images_sha256(self) -> str:
        """SHA-256 over the images' digests."""
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
        """The names of those digests in an array's provenance that are not this ledger's."""
        properties = {
            "pictures_sha256": "images_sha256",
            "labels_sha256": "labels_sha256",
            "captions_sha256": "captions_sha256",
        }
        return [
            name for name, own in properties.items() if name in provenance and provenance[name] != getattr(self, own)
        ]

    @property
    def labels(self) -> np.ndarray:
        """(rows,) int64, -1 where an image has none."""
        return pc.fill_null(self.table["label"], -1).to_numpy().astype(np.int64)

    @property
    def images(self) -> Lines[SourceImage]:
        """The image of each row."""
        return Lines(self.table, _image)

    @property
    def boxes(self) -> Lines[Box]:
        """The crop of each row."""
        return Lines(self.table, lambda line: tuple(line["box"]))

    def part(self, rows: range | list[int]) -> tuple[tuple[SourceImage, ...], tuple[Box, ...], tuple[str, ...]]:
        """Images, boxes and digests of some rows."""
        lines = self.table.take(list(rows)).to_pylist()
        return (
            tuple(_image(line) for line in lines),
            tuple(tuple(line["box"]) for line in lines),
            tuple(line["sha256"] for line in lines),
        )


class Lines(Sequence[T]):
    """The lines of a table, each made an object when it is read."""

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
        for batch in self._table.to_batches(max_chunksize=LINES_AT_ONCE):
            yield from map(self._make, batch.to_pylist())


def unchanged_ledger(root: Path, listing_arguments: Sequence[object]) -> Ledger | None:
    """The ledger of a root, where nothing has changed since, which is decided without listing the source; else None.

    `listing_arguments` are those of `list_images`.
    """
    path = ledger_path(root)
    if not path.is_file():
        return None
    stored = read_ledger_metadata(path).get("stamp")
    if not stored:
        return None
    sources = pc.unique(read_table(path, ["source"])["source"]).to_pylist()
    return read_ledger(root) if change_stamp(listing_arguments, sources) == stored else None


def ledger_of_listing(root: Path, listing: Listing) -> Ledger | None:
    """The ledger of a root that was made of this very listing; None where there is none, or another."""
    path = ledger_path(root)
    if path.is_file() and read_ledger_metadata(path).get("listing_sha256") == listing.sha256:
        return read_ledger(root)
    return None


def write_ledger(
    root: Path, table: pa.Table, ledger: Ledger, listing: Listing, listing_arguments: Sequence[object] | None = None
) -> None:
    """Write all lines of a ledger with what it was made of; its pages carry checksums, which reading compares."""
    sources = {image.source for image in listing.images}
    stamp = change_stamp(listing_arguments, sources) if listing_arguments else None
    metadata = {
        "format": FORMAT,
        "source": ledger.source,
        "crop": ledger.crop,
        "listing_sha256": listing.sha256,
        "stamp": stamp or "",
        "keys_sha256": ledger.keys_sha256,
    } | ({"classes": json.dumps(ledger.classes)} if ledger.classes else {})
    with atomic_write(ledger_path(root)) as temporary:
        pq.write_table(table.replace_schema_metadata(metadata), temporary, write_page_checksum=True)
    draft_ledger_path(root).unlink(missing_ok=True)


def read_ledger(root: Path) -> Ledger:
    """The ledger of a store root. Raises UserError when there is none."""
    path = ledger_path(root)
    if not path.is_file():
        raise UserError(
            f"{root} is not a store root (it has no rows.parquet); `featurize extract --out {root}` makes one."
        )
    stored = read_ledger_metadata(path)
    classes = tuple(json.loads(stored.get("classes", "[]")))
    return ledger_of(read_table(path), stored.get("source", ""), stored.get("crop", str(SQUARE)), classes)


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """All lines of a ledger, refused ones as well. Raises UserError for a damaged file."""
    try:
        with path.open("rb") as file:
            return pq.read_table(file, columns=columns, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"The ledger {path} is damaged ({str(error).splitlines()[0]}); `featurize repair` makes it again."
        ) from None


def ledger_of(table: pa.Table, source: str, crop: str, classes: tuple[str, ...] = ()) -> Ledger:
    """The ledger of a table of all lines."""
    stored = table.filter(pc.is_valid(table["row"])) if table["row"].null_count else table
    return Ledger(source, crop, stored.combine_chunks(), len(table) - len(stored), classes)


def _image(line: dict[str, Any]) -> SourceImage:
    return SourceImage(
        line["key"], line["source"], line["offset"], line["size"], line["label"], tuple(line["captions"])
    )


def captions_digest(captions: Sequence[str]) -> str:
    """SHA-256 of captions, or of prompts, as a JSON list."""
    return hashlib.sha256(json.dumps(list(captions)).encode()).hexdigest()


def _digest(column: pa.ChunkedArray, after_each: str) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(column), LINES_AT_ONCE):
        digest.update(
            "".join(f"{text}{after_each}" for text in column.slice(start, LINES_AT_ONCE).to_pylist()).encode()
        )
    return digest.hexdigest()


def read_ledger_metadata(path: Path) -> dict[str, str]:
    """What a ledger says it was made of: source, crop, listing. Raises UserError for a damaged file."""
    try:
        with path.open("rb") as file:
            stored = pq.read_schema(file).metadata or {}
    except (pa.ArrowException, OSError):
        raise UserError(f"The ledger {path} is damaged; `featurize repair` makes it again.") from None
    return {key.decode(): value.decode() for key, value in stored.items()}
