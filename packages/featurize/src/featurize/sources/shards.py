"""Webdataset shards, here or far away: tar files whose members with one key make one sample."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import PurePosixPath

from braceexpand import braceexpand
from tqdm import tqdm

from featurize.errors import UserError
from featurize.io.addresses import AT_ONCE, exists, is_remote, matching
from featurize.sources.listing import Index, Listing, Query, SourceImage
from featurize.sources.outside_text import Oddities
from featurize.sources.tars.index import index_of

MOST_SHARDS = 10_000_000  # that braces stand for


def list_shards(query: Query) -> Listing:
    """The samples of tar shards, in the order of the shards and of the members in them.

    The address may hold braces (`train-{000000..000009}.tar`), wildcards, and `::` between several; a folder stands for its
    `.tar` files. A sample's label is its `.cls`; its captions are the `.txt`, or `captions` (or `caption`) of its `.json`,
    which may hold a `label` as well. Only headers and annotations are read, of a remote shard by ranges.
    """
    shards, remarks = expand(query.address)
    images: list[SourceImage] = []
    odd = Oddities()
    for shard, index in zip(shards, _indices(shards)):
        for kind, count, where in index.odd:
            odd.add(kind, f"{where} in {shard}", count)
        images += index.images
        if query.limit is not None and len(images) >= query.limit:
            images = images[: query.limit]
            break
    remarks += odd.remarks
    repeated = _repeated_across_shards(images)
    if repeated:
        # Some data sets number the samples anew in each shard.
        names = _short_names({image.source: None for image in images})
        images = [replace(image, key=f"{names[image.source]}/{image.key}") for image in images]
        remarks.append(f"The key {repeated} is in several shards, so the shard's name was put before each key.")
    return Listing(tuple(images), tuple(remarks))


def expand(address: str) -> tuple[list[str], list[str]]:
    """The shards that an address names, each once, and remarks. Raises UserError where a pattern names none."""
    shards: list[str] = []
    for pattern in chain.from_iterable(map(_braces, address.split("::"))):
        found = matching(pattern)
        if not found:
            raise UserError(f"No shard is named like {pattern}; check the path after wds:.")
        shards += found
    once = list(dict.fromkeys(shards))
    twice = len(shards) - len(once)
    return once, [f"{twice} shards are named more than once; each is taken once."] if twice else []


def _braces(pattern: str) -> Iterable[str]:
    """The patterns that braces stand for; a file or folder that has braces in its name is itself."""
    if not is_remote(pattern) and exists(pattern):
        return [pattern]
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern)
    if (count := math.prod(abs(int(last) - int(first)) + 1 for first, last in ranges)) > MOST_SHARDS:
        raise UserError(f"{pattern} stands for {count:,} shards; the most are {MOST_SHARDS:,}.")
    try:
        return list(braceexpand(pattern))
    except ValueError:
        raise UserError(f"The braces of {pattern} are not in pairs; write train-{{000..099}}.tar.") from None


def _indices(shards: Sequence[str]) -> Iterator[Index]:
    """The index of each shard, in order; remote ones are read side by side, a few ahead of what is taken."""
    remote = any(is_remote(shard) for shard in shards)
    with (
        ThreadPoolExecutor(AT_ONCE if remote else 1) as pool,
        tqdm(total=len(shards), desc="listing", unit=" shards", delay=2) as progress,
    ):
        waiting = [pool.submit(index_of, shard) for shard in shards[:AT_ONCE]]
        try:
            for number in range(len(shards)):
                yield waiting.pop(0).result()
                progress.update()
                if number + AT_ONCE < len(shards):
                    waiting.append(pool.submit(index_of, shards[number + AT_ONCE]))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _repeated_across_shards(images: Sequence[SourceImage]) -> str | None:
    """A key that is in more than one shard."""
    homes: dict[str, str] = {}
    return next((p.key for p in images if homes.setdefault(p.key, p.source) != p.source), None)


def _short_names(shards: dict[str, None]) -> dict[str, str]:
    """The shards' names without folders where these differ, else with as many folders as it takes, and with `.tar` if need be."""
    for ending in (r"\.tar$", "$"):
        parts = {shard: PurePosixPath(re.sub(ending, "", shard)).parts for shard in shards}
        for depth in range(1, max(map(len, parts.values())) + 1):
            names = {shard: "/".join(path[-depth:]) for shard, path in parts.items()}
            if len(set(names.values())) == len(names):
                return names
    return {shard: shard for shard in shards}
