"""Store roots that are no local folder: any address that fsspec knows, such as s3://bucket/stores/coco-train."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

import numpy as np

from nestgen.errors import UserError

TRIES = 5  # of a read that the network failed, with 1, 2, 4, ... seconds between


@dataclass(frozen=True)
class Remote:
    """A file or folder at an address. It has what is used here of pathlib.Path."""

    protocol: str  # with ://
    path: PurePosixPath

    def __str__(self) -> str:
        return f"{self.protocol}{self.path}"

    def __truediv__(self, part: str | Path) -> Remote:
        return Remote(self.protocol, self.path / part)

    def joinpath(self, *parts: str) -> Remote:
        """The address below this one."""
        return Remote(self.protocol, self.path.joinpath(*parts))

    @property
    def parent(self) -> Remote:
        """The folder it is in."""
        return Remote(self.protocol, self.path.parent)

    @property
    def name(self) -> str:
        """Its last part."""
        return self.path.name

    @property
    def stem(self) -> str:
        """Its last part without the ending."""
        return self.path.stem

    def with_suffix(self, suffix: str) -> Remote:
        """The same with another ending."""
        return Remote(self.protocol, self.path.with_suffix(suffix))

    def is_dir(self) -> bool:
        """Whether anything is there; a folder of an object store is no more than that."""
        return bool(self._filesystem().exists(str(self)))

    def is_file(self) -> bool:
        """Whether a file is there."""
        return bool(self._filesystem().isfile(str(self)))

    def read_text(self, encoding: str = "utf-8") -> str:
        """The content of a file."""
        return self.read_bytes().decode(encoding)

    def read_bytes(self) -> bytes:
        """The content of a file. Raises FileNotFoundError, or OSError once TRIES reads have failed."""
        for attempt in range(TRIES):
            try:
                return bytes(self._filesystem().cat_file(str(self)))
            except FileNotFoundError:
                raise
            except Exception as error:  # what a network raises differs between its libraries
                if attempt + 1 == TRIES:
                    raise OSError(f"{self} cannot be read: {error}") from error
                time.sleep(2**attempt)
        raise AssertionError("not reached")

    def _filesystem(self) -> Any:
        import fsspec

        try:
            return fsspec.url_to_fs(str(self))[0]
        except (ImportError, ValueError) as error:
            raise UserError(f"{self} cannot be opened: {' '.join(str(error).split())}") from None


def address(root: Path, name: str) -> Path | Remote:
    """What a recipe in the folder `root` means by a name: an address if it has ://, else a path."""
    protocol, mark, path = name.partition("://")
    return Remote(protocol + mark, PurePosixPath(path)) if mark else root / name


class RemoteBlocks:
    """The blocks of an array by number, each read whole; the `kept` last used stay in memory."""

    def __init__(self, path: Remote, count: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._path, self._count, self._shape, self._dtype = path, count, shape, dtype
        self._pool, self._lock = ThreadPoolExecutor(8, "blocks"), Lock()
        self._blocks: OrderedDict[int, Future[np.ndarray]] = OrderedDict()
        self.kept = 4

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> np.ndarray:
        try:
            return self._ask(number).result()
        except BaseException:
            with self._lock:
                self._blocks.pop(number, None)  # a failure is not kept
            raise

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Begins to read blocks that will be asked for."""
        for number in numbers:
            self._ask(int(number))

    def _ask(self, number: int) -> Future[np.ndarray]:
        with self._lock:
            if number not in self._blocks:
                self._blocks[number] = self._pool.submit(self._read, number)
                while len(self._blocks) > self.kept:
                    self._blocks.popitem(last=False)[1].cancel()
            self._blocks.move_to_end(number)
            return self._blocks[number]

    def _read(self, number: int) -> np.ndarray:
        chunk = self._path.joinpath("c", str(number), *["0"] * (len(self._shape) - 1))
        size = int(np.prod(self._shape)) * self._dtype.itemsize
        try:
            data = chunk.read_bytes()
        except FileNotFoundError:
            raise UserError(f"{self._path} is damaged: block {number} is missing; extract it again") from None
        if len(data) != size:
            raise UserError(
                f"{self._path} is damaged: block {number} has {len(data)} bytes instead of {size}; extract it again"
            )
        return np.frombuffer(data, self._dtype).reshape(self._shape)
