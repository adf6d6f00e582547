"""Parts of files read ahead: those that lie side by side by one read, several reads at a time, a bounded number of bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from threading import Event
from typing import NamedTuple

from featurize.io.addresses import AT_ONCE, read_range

SPAN = 4 << 20  # bytes that one read gets at most, where it gets several parts
GAP = 64 << 10  # bytes between two parts that are read rather than left out: in a shard, headers and annotations
BYTES_AHEAD = 64 << 20  # that are read and not yet taken; one part may have more


class Range(NamedTuple):
    """The bytes [offset, offset + size) of the file at an address."""

    address: str
    offset: int
    size: int


@dataclass(frozen=True)
class _Span:
    """Ranges that one read gets, and whether all of them were taken."""

    ranges: tuple[Range, ...]
    taken: Event = field(default_factory=Event)

    @property
    def size(self) -> int:
        last = self.ranges[-1]
        return last.offset + last.size - self.ranges[0].offset


def read_ahead(ranges: Sequence[Range]) -> Iterator[Callable[[], bytes]]:
    """For each range, in their order, what gives its bytes; fewer where the file ends before it.

    Each must be called once, in any thread. It raises what `read_range` does.
    """
    spans = list(_spans(ranges))
    futures: dict[int, Future[bytes]] = {}
    submitted = freed = held = 0
    pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="read ahead")
    try:
        for number, span in enumerate(spans):
            while submitted < len(spans):
                size, is_needed = spans[submitted].size, submitted == number
                while freed < number and (spans[freed].taken.is_set() or (is_needed and held + size > BYTES_AHEAD)):
                    spans[freed].taken.wait()
                    held -= spans[freed].size
                    freed += 1
                if held + size > BYTES_AHEAD and not is_needed:
                    break
                futures[submitted] = pool.submit(_read, spans[submitted])
                submitted += 1
                held += size
            yield from _parts(span, futures.pop(number))  # which keeps the bytes no longer than they are needed
    except BaseException:  # nobody takes the rest
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown(wait=False)


def _spans(ranges: Sequence[Range]) -> Iterator[_Span]:
    together: list[Range] = []
    for one in ranges:
        if together and not _follows(one, together):
            yield _Span(tuple(together))
            together = []
        together.append(one)
    if together:
        yield _Span(tuple(together))


def _follows(one: Range, together: list[Range]) -> bool:
    """Whether a range is read together with those before it."""
    first, last = together[0], together[-1]
    gap = one.offset - (last.offset + last.size)
    return one.address == first.address and 0 <= gap <= GAP and one.offset + one.size - first.offset <= SPAN


def _read(span: _Span) -> bytes:
    first = span.ranges[0]
    return read_range(first.address, first.offset, span.size)


def _parts(span: _Span, read: Future[bytes]) -> Iterator[Callable[[], bytes]]:
    taken = count(1)

    def take(one: Range) -> bytes:
        start = one.offset - span.ranges[0].offset
        try:
            return read.result()[start : start + one.size]
        finally:
            if next(taken) == len(span.ranges):
                span.taken.set()

    for one in span.ranges:
        yield lambda one=one: take(one)  # type: ignore[misc]
