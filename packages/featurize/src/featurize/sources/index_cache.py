"""Indices of shards, cached in the user's cache folder: a shard that has not changed is not scanned again."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from featurize.io.addresses import File, is_remote
from featurize.io.files import atomic_write
from featurize.io.home import cache_folder
from featurize.sources.listing import Index, SourceImage

RULES = 1  # raise it when the same shard gives another index
WORTH_CACHING = 1000  # images; a local shard with fewer is scanned as fast as the cached file is read
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("label", pa.int64()),
        ("captions", pa.list_(pa.string())),
    ]
)


def cached_index(shard: File, scan: Callable[[], Index]) -> Index:
    """The cached index of this version of the shard; else what `scan` gives, cached where that saves time.

    A cache that can't be read or written is not an error. Where the server gives no version, nothing is cached.
    """
    if not shard.version:
        return scan()
    name = sha256(json.dumps([RULES, shard.address, shard.size, shard.version]).encode()).hexdigest()
    path = cache_folder() / "shards" / f"{name}.parquet"
    with suppress(OSError, pa.ArrowException, KeyError, ValueError):
        return _load(path, shard)
    index = scan()
    if is_remote(shard.address) or len(index.images) >= WORTH_CACHING:
        with suppress(OSError, pa.ArrowException):
            _save(path, index)
    return index


def _load(path: Path, shard: File) -> Index:
    with path.open("rb") as file:
        table = pq.read_table(file)
    columns = (table[field.name].to_pylist() for field in SCHEMA)
    images = tuple(
        SourceImage(key, shard.address, offset, size, label, tuple(captions), shard.version)
        for key, offset, size, label, captions in zip(*columns, strict=True)
    )
    odd = json.loads(table.schema.metadata[b"odd"])
    return Index(images, tuple((what, count, where) for what, count, where in odd))


def _save(path: Path, index: Index) -> None:
    columns = {field.name: [getattr(image, field.name) for image in index.images] for field in SCHEMA}
    table = pa.table(columns, SCHEMA).replace_schema_metadata({"odd": json.dumps(index.odd)})
    with atomic_write(path) as temporary:
        pq.write_table(table, temporary)
