"""Indices of shards, cached in the user's cache folder: a shard that has not changed is not scanned again."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from featurize.errors import UserError
from featurize.io.addresses import File, is_remote
from featurize.io.files import atomic_write, json_sha256
from featurize.io.home import cache_folder
from featurize.sources.listing import Index, SourceImage

log = logging.getLogger(__name__)

RULES = 2  # raise it when the same shard gives another index
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
    version = [RULES, shard.address, shard.size, shard.version, *shard.identity]
    try:
        path = cache_folder() / "shards" / f"{sha256(json.dumps(version).encode()).hexdigest()}.parquet"
    except UserError:  # there is no home folder
        return scan()
    try:
        return _load(path, shard)
    except FileNotFoundError:
        pass
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError, AttributeError):
        log.warning("The cached index of %s is damaged or can't be read; the shard is scanned again.", shard.address)
    index = scan()
    if is_remote(shard.address) or len(index.images) >= WORTH_CACHING:
        with suppress(OSError, pa.ArrowException):
            _save(path, index)
    return index


def _load(path: Path, shard: File) -> Index:
    with path.open("rb") as file:
        table = pq.read_table(file)
    columns = {field.name: table[field.name].to_pylist() for field in SCHEMA}
    odd = json.loads(table.schema.metadata[b"odd"])
    if table.schema.metadata[b"sha256"].decode() != json_sha256([columns, odd]):
        raise ValueError("its digest is another")
    images = tuple(
        SourceImage(key, shard.address, offset, size, label, tuple(captions), shard.version)
        for key, offset, size, label, captions in zip(*columns.values(), strict=True)
    )
    return Index(images, tuple((what, count, where) for what, count, where in odd))


def _save(path: Path, index: Index) -> None:
    columns = {field.name: [getattr(image, field.name) for image in index.images] for field in SCHEMA}
    table = pa.table(columns, SCHEMA)
    facts = {"odd": json.dumps(index.odd), "sha256": json_sha256([table.to_pydict(), index.odd])}
    table = table.replace_schema_metadata(facts)
    with atomic_write(path) as temporary:
        pq.write_table(table, temporary)
