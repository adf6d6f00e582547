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
from featurize.images.crop import SQUARE
from featurize.io.files import atomic_write, read_json, write_json
from featurize.sources import Listing, SourceImage
from featurize.sources.change_stamp import change_stamp
from featurize.store.layout import draft_ledger_path, ledger_path, listing_path
from featurize.store.metadata import FORMAT

T = TypeVar("T")

CONTENT_DIGEST = "content_sha256"
UNJUDGED = "decoder"  # in the metadata: the decoder of a first pass that does not look for what libjpeg warns of
# What pyarrow raises for a damaged file, beside its own exceptions.
DAMAGE = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, MemoryError, OverflowError)
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
    def damaged(self) -> int:
        """How many stored images have a file that libjpeg warns of; ledgers of 0.1.0 don't say."""
        return int(pc.sum(pc.not_equal(self.table["reason"], "")).as_py() or 0)

    @property
    def labels(self) -> np.ndarray:
        """(rows,) int64, -1 where an image has none."""
        return pc.fill_null(self.table["label"], -1).to_numpy().astype(np.int64)

    @property
    def images(self) -> Lines[SourceImage]:
        """The image of each row."""
        return Lines(self.table, _image)

    def part(self, rows: range | list[int]) -> tuple[tuple[SourceImage, ...], tuple[str, ...]]:
        """Images and digests of some rows."""
        lines = self.table.take(list(rows)).to_pylist()
        return (
            tuple(_image(line) for line in lines),
            tuple(line["sha256"] for line in lines),
        )

    def digests(self, rows: list[int]) -> list[str]:
        """The digests of some rows, "" for an image that was not read yet."""
        return self.table["sha256"].take(rows).to_pylist()


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
    stored = _listed(root).get("stamp")
    if not stored:
        return None
    sources = pc.unique(read_table(path, ["source"])["source"]).to_pylist()
    return read_ledger(root) if change_stamp(listing_arguments, sources) == stored else None


def ledger_of_listing(root: Path, listing: Listing) -> Ledger | None:
    """The ledger of a root that was made of this very listing; None where there is none, or another."""
    if ledger_path(root).is_file() and _listed(root).get("listing_sha256") == listing.sha256:
        return read_ledger(root)
    return None


def _listed(root: Path) -> dict[str, Any]:
    """Digests of the listing and of the request that a ledger was made of; those of earlier versions hold both themselves.

    Nothing where that is damaged, or of another ledger: the source is listed and read again.
    """
    metadata = read_ledger_metadata(ledger_path(root))
    if CONTENT_DIGEST not in metadata:
        return metadata
    try:
        listed = read_json(listing_path(root))
        return listed if listed[CONTENT_DIGEST] == metadata[CONTENT_DIGEST] else {}
    except (UserError, OSError, KeyError):
        return {}


def write_ledger(
    root: Path, table: pa.Table, ledger: Ledger, listing: Listing, listing_arguments: Sequence[object] | None = None
) -> None:
    """Write all lines of a ledger and, in a file of its own, which listing it was made of.

    The ledger's bytes depend on the images alone, not on times and other folders. Its pages carry checksums, which reading
    compares, and it holds a digest of all that it says, which `verify` compares.
    """
    metadata = {"format": FORMAT, "source": ledger.source, "crop": ledger.crop, "keys_sha256": ledger.keys_sha256}
    metadata |= {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    if ledger.classes:
        metadata["classes"] = json.dumps(ledger.classes)
    metadata[CONTENT_DIGEST] = _content_sha256(table, metadata)
    with atomic_write(ledger_path(root)) as temporary:
        pq.write_table(table.replace_schema_metadata(metadata), temporary, write_page_checksum=True)
    stamp = change_stamp(listing_arguments, {image.source for image in listing.images}) if listing_arguments else None
    listed = {CONTENT_DIGEST: metadata[CONTENT_DIGEST], "listing_sha256": listing.sha256, "stamp": stamp}
    write_json(listing_path(root), listed)
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
            table = pq.read_table(file, columns=columns, page_checksum_verification=True)
        if table.schema.remove_metadata() != pa.schema([SCHEMA.field(name) for name in columns or SCHEMA.names]):
            raise pa.ArrowInvalid("its columns are others")
        return table
    except DAMAGE as error:
        raise UserError(
            f"The ledger {path} is damaged ({(str(error).splitlines() or ['unreadable'])[0]}); `featurize repair` makes it again."
        ) from None


def has_whole_content(path: Path) -> bool:
    """Whether a ledger says what was written: its lines and its metadata, of which a footer's damage would change some.

    Raises UserError for a damaged file. Ledgers of earlier versions hold no digest.
    """
    metadata = read_ledger_metadata(path)
    digest = metadata.pop(CONTENT_DIGEST, None)
    if digest is None:
        return metadata.keys() <= {"format", "source", "crop", "keys_sha256", "listing_sha256", "stamp"}
    return digest == _content_sha256(read_table(path), metadata)


def _content_sha256(table: pa.Table, metadata: dict[str, str]) -> str:
    """SHA-256 over the metadata, then the lines, as JSON."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for batch in table.to_batches(max_chunksize=LINES_AT_ONCE):
        for line in batch.to_pylist():
            digest.update(f"{json.dumps(line)}\n".encode())
    return digest.hexdigest()


def ledger_of(table: pa.Table, source: str, crop: str, classes: tuple[str, ...] = ()) -> Ledger:
    """The ledger of a table of all lines."""
    stored = table.filter(pc.is_valid(table["row"])) if table["row"].null_count else table
    return Ledger(source, crop, stored.combine_chunks(), len(table) - len(stored), classes)


def _image(line: dict[str, Any]) -> SourceImage:
    return SourceImage(
        line["key"], line["source"], line["offset"], line["size"], line["label"], tuple(line["captions"]),
        line.get("version") or 0,  # only in the ledger of a first pass
    )  # fmt: skip


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
        return {key.decode(): value.decode() for key, value in stored.items()}
    except DAMAGE:
        raise UserError(f"The ledger {path} is damaged; `featurize repair` makes it again.") from None
