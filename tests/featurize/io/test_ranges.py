"""Parts of files read ahead: in a few reads, within a bound of bytes, and again where a disk hiccups."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from featurize.io import addresses, ranges
from featurize.io.ranges import GAP, Range, read_ahead

Read = Callable[[str, int, int], bytes]


@pytest.fixture
def file(tmp_path: Path) -> bytes:
    """The content of `part.bin` in the folder, a megabyte."""
    data = np.random.default_rng(0).bytes(1 << 20)
    (tmp_path / "part.bin").write_bytes(data)
    return data


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(offset, size) of every read, in no particular order."""
    noted: list[tuple[int, int]] = []
    read: Read = addresses.read_range

    def note(address: str, offset: int, size: int) -> bytes:
        noted.append((offset, size))
        return read(address, offset, size)

    monkeypatch.setattr(ranges, "read_range", note)
    return noted


def test_parts_side_by_side_are_one_read(
    file: bytes, reads: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "SPAN", 300_000)
    address = str(tmp_path / "part.bin")
    places = [
        (0, 100), (100, 50), (150 + GAP, 0), (151 + GAP, 10),  # with gaps that are read over
        (162 + 2 * GAP, 9),  # one byte further away
        (100, 20), (90, 20),  # back, and back once more into what was just read
        (200_000, 299_000), (499_500, 499), (500_000, 4),  # the last one no longer fits
    ]  # fmt: skip
    parts = [reader() for reader in read_ahead([Range(address, *place) for place in places])]
    assert parts == [file[offset : offset + size] for offset, size in places]
    assert sorted(reads) == sorted(
        [(0, 161 + GAP), (162 + 2 * GAP, 9), (100, 20), (90, 20), (200_000, 299_999), (500_000, 4)]
    )


def test_a_file_that_ends_early_gives_what_it_has(file: bytes, tmp_path: Path) -> None:
    address = str(tmp_path / "part.bin")
    near_end = Range(address, len(file) - 10, 8), Range(address, len(file) - 2, 8), Range(address, len(file) + 3, 8)
    assert [reader() for reader in read_ahead(near_end)] == [file[-10:-2], file[-2:], b""]


@pytest.mark.parametrize("threads", [0, 3])
def test_what_is_read_and_not_taken_is_bounded(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whoever it is taken: one part may be larger than the bound, and then nothing else is in memory."""
    monkeypatch.setattr(ranges, "BYTES_AHEAD", 1000)
    sizes = [300, 200, 400, 5000, 100, 900, 50, 60, 70, 80, 90, 100] * 20
    lock, held, most, alone = threading.Lock(), [0], [0], [True]

    def read(address: str, offset: int, size: int) -> bytes:
        with lock:
            held[0] += size
            most[0] = max(most[0], held[0])
            alone[0] &= size < 5000 or held[0] == size
        return bytes([offset // GAP % 251]) * size

    def take(pair: tuple[int, Callable[[], bytes]]) -> bool:
        index, reader = pair
        data = reader()  # from here on it is the taker's
        with lock:
            held[0] -= len(data)
        return data == bytes([2 * index % 251]) * sizes[index]

    monkeypatch.setattr(ranges, "read_range", read)
    readers = enumerate(read_ahead([Range("x", 2 * GAP * index, size) for index, size in enumerate(sizes)]))
    if threads:
        with ThreadPoolExecutor(threads) as pool:
            right = list(pool.map(take, readers))
    else:
        right = list(map(take, readers))
    assert right == [True] * len(sizes)
    assert 900 < most[0] <= 5000 + threads * 900  # which is noted as taken a little late by each
    assert alone[0] or threads


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_disk_that_hiccups_is_asked_again(
    number: int, file: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, read, failures = str(tmp_path / "part.bin"), addresses._read_local, [2]

    def hiccup(*place: object) -> bytes:
        failures[0] -= 1
        if failures[0] >= 0:
            raise OSError(number, os.strerror(number), address)
        return read(*place)  # type: ignore[arg-type]

    monkeypatch.setattr(addresses, "_read_local", hiccup)
    monkeypatch.setattr(addresses, "FIRST_WAIT", 0.01)
    assert [reader() for reader in read_ahead([Range(address, 5, 10)])] == [file[5:15]]
    assert failures == [-1]
    monkeypatch.setattr(addresses, "DEADLINE", 0.2)
    failures[0] = 1_000_000
    with pytest.raises(OSError, match=os.strerror(number)):
        addresses.read_range(address, 0, 1)
    assert failures[0] <= 1_000_000 - 3


def test_a_file_that_is_not_there_is_not_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "FIRST_WAIT", 1000.0)
    (tmp_path / "folder").mkdir()
    for name, error in (("nothing", FileNotFoundError), ("folder", IsADirectoryError)):
        [reader] = read_ahead([Range(str(tmp_path / name), 0, 1)])
        with pytest.raises(error):
            reader()
