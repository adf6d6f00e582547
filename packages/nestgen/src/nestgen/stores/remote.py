"""Blocks of a store in remote storage: any address that fsspec supports, such as s3://bucket/stores/coco-train."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np
from upath import UPath

from nestgen.errors import UserError

TRIES = 5  # of a read that the network failed, with 1, 2, 4, ... seconds between


def read(path: Path | UPath) -> bytes:
    """The content of a file. Raises FileNotFoundError, or OSError once TRIES remote reads have failed."""
    if isinstance(path, Path):
        return path.read_bytes()
    for attempt in range(TRIES):
        try:
            return bytes(path.fs.cat_file(path.path))  # one request, where read_bytes opens the file first
        except FileNotFoundError:
            raise
        except Exception as error:  # what a network raises differs between its libraries
            if attempt + 1 == TRIES:
                raise OSError(f"{path} cannot be read: {error}") from error
            time.sleep(2**attempt)
    raise AssertionError("not reached")


class RemoteBlocks:
    """The blocks of an array by number, each read whole; the `cached` last used stay in memory."""

    def __init__(self, path: UPath, count: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._path, self._count, self._shape, self._dtype = path, count, shape, dtype
        self._pool, self._lock = ThreadPoolExecutor(8, "blocks"), Lock()
        self._blocks: OrderedDict[int, Future[np.ndarray]] = OrderedDict()
        self.cached = 4

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> np.ndarray:
        try:
            return self._request(number).result()
        except BaseException:
            with self._lock:
                self._blocks.pop(number, None)  # a failure is not cached
            raise

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Begins to read blocks that will be needed."""
        for number in numbers:
            self._request(int(number))

    def _request(self, number: int) -> Future[np.ndarray]:
        with self._lock:
            if number not in self._blocks:
                self._blocks[number] = self._pool.submit(self._read, number)
                while len(self._blocks) > self.cached:
                    self._blocks.popitem(last=False)[1].cancel()
            self._blocks.move_to_end(number)
            return self._blocks[number]

    def _read(self, number: int) -> np.ndarray:
        chunk = self._path.joinpath("c", str(number), *["0"] * (len(self._shape) - 1))
        size = int(np.prod(self._shape)) * self._dtype.itemsize
        try:
            data = read(chunk)
        except FileNotFoundError:
            raise UserError(f"{self._path} is damaged: block {number} is missing; extract it again") from None
        if len(data) != size:
            raise UserError(
                f"{self._path} is damaged: block {number} has {len(data)} bytes instead of {size}; extract it again"
            )
        return np.frombuffer(data, self._dtype).reshape(self._shape)
