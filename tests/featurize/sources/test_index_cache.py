"""A cached index with a flipped bit is not used: the shard is scanned again."""

from __future__ import annotations

import logging
import os
import random
from pathlib import Path

import pytest

from featurize.io.addresses import find
from featurize.sources import index_cache
from featurize.sources.index_cache import cached_index
from featurize.sources.listing import Index, SourceImage

FLIPS = 100


def test_a_flipped_bit_is_found_or_harmless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FEATURIZE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index_cache, "WORTH_CACHING", 1)
    (tmp_path / "a.tar").write_bytes(b"shard")
    shard = find(str(tmp_path / "a.tar"))
    images = [
        SourceImage(f"{n:04d}", shard.address, 512 * n, 99, n % 7 or None, (f"caption {n}",) * (n % 3), shard.version)
        for n in range(60)
    ]
    index = Index(tuple(images), (("odd members", 2, "x"),))
    scans = 0

    def scan() -> Index:
        nonlocal scans
        scans += 1
        return index

    assert cached_index(shard, scan) == cached_index(shard, scan) == index
    assert scans == 1
    (cached,) = (tmp_path / "cache" / "shards").iterdir()
    whole = cached.read_bytes()
    chance = random.Random(0)
    flips = int(os.environ.get("FLIPS", FLIPS))
    with caplog.at_level(logging.WARNING):
        for _ in range(flips):
            data = bytearray(whole)
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            cached.write_bytes(bytes(data))
            assert cached_index(shard, scan) == index
    assert scans - 1 == len([line for line in caplog.messages if "the shard is scanned again" in line])
    assert scans > flips / 3  # the others are in what no reader uses
