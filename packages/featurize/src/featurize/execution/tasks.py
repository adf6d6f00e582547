"""The interface of every engine, and the simplest of them: one task after the other in this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from featurize.errors import explain_os_error
from featurize.execution.interrupt import stop_requested

T = TypeVar("T")
R = TypeVar("R")

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # read by libraries as they are loaded


class Run(Protocol):
    """Calls a function on each task; yields (index of the task, result) as they are done, in any order.

    Tasks are drawn from the iterable as they are needed. After a first Ctrl-C none is begun any more, those under way are
    finished and yielded, then KeyboardInterrupt is raised.
    """

    def __call__(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[tuple[int, R]]: ...


def run_here(function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[tuple[int, R]]:
    """The tasks one after the other in this process."""
    for index, task in enumerate(tasks):
        yield index, call(function, task)
        if stop_requested():
            raise KeyboardInterrupt


def call(function: Callable[[T], R], task: T) -> R:
    """The function's result. It computes on one thread: sums are made in the same order whatever the number of cores, and
    workers don't fight for them. Raises UserError for a failed read or write that the user can fix."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    with one_thread():
        try:
            return function(task)
        except OSError as error:
            raise explain_os_error(error) or error from None


@contextmanager
def one_thread() -> Iterator[None]:
    """Linear algebra on one thread: in the libraries that are loaded, and in those that the block imports, which read how many
    from the environment then."""
    from threadpoolctl import threadpool_limits

    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        with threadpool_limits(1):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def in_order(results: Iterator[tuple[int, R]]) -> Iterator[R]:
    """The results by the index of their task."""
    waiting: dict[int, R] = {}
    following = 0
    for index, result in results:
        waiting[index] = result
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def ordered_map(run: Run) -> Callable[[Callable[[T], R], Iterable[T]], Iterator[R]]:
    """Python's `map`, carried out by an engine."""
    return lambda function, tasks: in_order(run(function, tasks))
