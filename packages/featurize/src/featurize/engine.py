"""Dask runs the tasks: in this process, on local workers, or on a cluster that is there already."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from threadpoolctl import threadpool_limits

from featurize.errors import UserError, explain_os_error

T = TypeVar("T")
R = TypeVar("R")


class Run(Protocol):
    """Calls a function on each task; yields (index of the task, result) as they are done, in any order."""

    def __call__(self, function: Callable[[T], R], tasks: Sequence[T]) -> Iterator[tuple[int, R]]: ...


@contextmanager
def engine(workers: int | None, scheduler: str | None) -> Iterator[Run]:
    """`workers` processes of this machine (None: one a core, or one a GPU; 0: this very process), or the cluster at
    `scheduler`. A task's result never depends on which of them ran it."""
    if scheduler is None and workers == 0:
        yield _run_here
        return
    import dask

    # Read when `distributed` is first imported: its start and stop messages would break the progress line.
    dask.config.set({"logging": {"distributed": "critical", "tornado": "critical"}})
    from distributed import Client, LocalCluster

    if scheduler is not None:
        try:
            client = Client(scheduler, timeout="20s", set_as_default=False)
        except (OSError, TimeoutError, ValueError):
            raise UserError(f"No Dask scheduler answers at {scheduler}; check --scheduler ADDRESS.") from None
        with client:
            yield partial(_run_on, client)
        return
    count = workers if workers is not None else torch.cuda.device_count() or os.cpu_count() or 1
    options: dict[str, Any] = {"n_workers": count, "threads_per_worker": 1, "dashboard_address": None}
    with LocalCluster(**options) as cluster, Client(cluster, set_as_default=False) as client:
        yield partial(_run_on, client)


def device_of_worker() -> str:
    """The device a task computes on: a GPU of its own when there is one."""
    if not torch.cuda.is_available():
        return "cpu"
    name = os.environ.get("DASK_WORKER_NAME", "0")
    return f"cuda:{int(name) % torch.cuda.device_count() if name.isdecimal() else 0}"


def _run_here(function: Callable[[T], R], tasks: Sequence[T]) -> Iterator[tuple[int, R]]:
    for index, task in enumerate(tasks):
        yield index, _call(function, task)


def _run_on(client: Any, function: Callable[[T], R], tasks: Sequence[T]) -> Iterator[tuple[int, R]]:
    from distributed import KilledWorker, as_completed

    # Only a few tasks are in the cluster at a time: memory stays bounded whatever the number of blocks.
    ahead = 2 * max(1, len(client.scheduler_info(n_workers=-1)["workers"]))
    waiting = iter(enumerate(tasks))
    running: dict[Any, int] = {}
    done = as_completed(loop=client.loop)

    def submit() -> None:
        for index, task in waiting:
            future = client.submit(_call, function, task, pure=False)
            running[future] = index
            done.add(future)
            return

    for _ in range(ahead):
        submit()
    try:
        while running:
            future = next(done)
            index = running.pop(future)
            try:
                result = future.result()
            except KilledWorker:
                raise UserError(
                    "A worker died several times over one block of rows (out of memory?); what is done is kept, "
                    "run the same command again with fewer --workers."
                ) from None
            submit()
            yield index, result
    finally:
        client.cancel(list(running))


def _call(function: Callable[[T], R], task: T) -> R:
    # One thread a task: sums are made in the same order whatever the number of cores, and workers don't fight for them.
    torch.set_num_threads(1)
    with threadpool_limits(1):
        try:
            return function(task)
        except OSError as error:
            raise explain_os_error(error) or error from None


def in_order(results: Iterator[tuple[int, R]]) -> Iterator[R]:
    """The results by the index of their task."""
    waiting: dict[int, R] = {}
    following = 0
    for index, result in results:
        waiting[index] = result
        while following in waiting:
            yield waiting.pop(following)
            following += 1
