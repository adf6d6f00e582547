"""Webdataset shards, here or far away: tar files whose members with one key make one sample."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import PurePosixPath

from braceexpand import braceexpand
from tqdm import tqdm

from featurize.errors import UserError
from featurize.io.addresses import AT_ONCE, is_remote, matching
from featurize.sources.listing import Index, Listing, Query, SourceImage
from featurize.sources.tar_index import index_of


def list_shards(query: Query) -> Listing:
    """The samples of tar shards, in the order of the shards and of the members in them.

    The address may hold braces (`train-{000000..000009}.tar`), wildcards, and `::` between several; a folder stands for its
    `.tar` files. A sample's label is its `.cls`; its captions are the `.txt`, or `captions` (or `caption`) of its `.json`,
    which may hold a `label` as well. Only headers and annotations are read, of a remote shard by ranges.
    """
    shards, remarks = expand(query.address)
    images: list[SourceImage] = []
    odd: Counter[str] = Counter()
    first: dict[str, str] = {}
    for shard, index in zip(shards, _indices(shards)):
        for kind, count, where in index.odd:
            odd[kind] += count
            first.setdefault(kind, f"{where} in {shard}")
        images += index.images
        if query.limit is not None and len(images) >= query.limit:
            images = images[: query.limit]
            break
    remarks += [f"{count:,} {kind} (first: {first[kind]})." for kind, count in odd.items()]
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
    for pattern in chain.from_iterable(map(braceexpand, address.split("::"))):
        found = matching(pattern)
        if not found:
            raise UserError(f"No shard is named like {pattern}; check the path after wds:.")
        shards += found
    once = list(dict.fromkeys(shards))
    twice = len(shards) - len(once)
    return once, [f"{twice} shards are named more than once; each is taken once."] if twice else []


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
    """The shards' names without folders where these differ, else with as many folders as it takes."""
    parts = {shard: PurePosixPath(re.sub(r"\.tar$", "", shard)).parts for shard in shards}
    depth = 1
    while len({path[-depth:] for path in parts.values()}) < len(parts):
        depth += 1
    return {shard: "/".join(path[-depth:]) for shard, path in parts.items()}
