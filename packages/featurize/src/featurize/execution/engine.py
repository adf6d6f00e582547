"""Dask runs the tasks: in this process, on local workers, or on a cluster that is there already."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from itertools import chain
from typing import Any, Protocol, TypeVar

from featurize.errors import UserError, explain_os_error
from featurize.execution.interrupt import asked_to_stop

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)

# Pillow holds the interpreter's lock too often for one process to keep a GPU busy: docs/performance.md has rates for 1, 2 and 4.
WORKERS_A_GPU = 4
MEMORY_A_WORKER = 10 << 30  # bytes of a GPU: Stable Diffusion's VAE takes about half of it for a batch
KEPT = 2**31 - 1  # bytes of free memory at the end of the heap
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
PATIENCE = 10.0  # seconds without a finished task, after which the workers are looked after


class Run(Protocol):
    """Calls a function on each task; yields (index of the task, result) as they are done, in any order.

    Tasks are drawn from the iterable as they are needed. After a first Ctrl-C none is begun any more, those in hand are
    finished and yielded, then KeyboardInterrupt is raised.
    """

    def __call__(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[tuple[int, R]]: ...


@contextmanager
def engine(workers: int | None, scheduler: str | None, imports: Sequence[str] = ()) -> Iterator[Run]:
    """`workers` processes of this machine (None: one a core, or four a GPU; 0: this very process), or the cluster at
    `scheduler`. They are started when the first task comes. A task's result never depends on which of them ran it.

    `imports` are modules that take long to import: local workers are forked from one process that has them (it has no threads
    yet, so forking it is safe). Not where there are GPUs: importing timm asks CUDA what there is, and no fork of a process that
    has asked may use it.
    """
    if scheduler is None and workers == 0:
        keep_memory()
        yield run_here
        return
    with ExitStack() as stack:
        started: list[Any] = []

        def run(function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[tuple[int, R]]:
            tasks = iter(tasks)
            first = next(tasks, None)
            if first is None:
                return
            if not started:
                started.append(stack.enter_context(_client(workers, scheduler, imports)))
            yield from _run_on(started[0], function, chain([first], tasks), is_local=scheduler is None)

        yield run


def cores() -> int:
    """Cores that this process may use, as Dask counts them (affinity and cgroups are heeded)."""
    from dask.system import CPU_COUNT

    return int(CPU_COUNT)


@cache
def gpus() -> int:
    """GPUs of this machine. Torch takes seconds to import, so it is asked only where a driver is."""
    from pathlib import Path

    if not (Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists() or "torch" in sys.modules):
        return 0
    import torch

    return torch.cuda.device_count()


def default_workers() -> int:
    """Up to four processes a GPU, as its memory allows (they decode in threads beside the encoder), else one a core."""
    if not gpus():
        return cores()
    import torch

    memory = torch.cuda.get_device_properties(0).total_memory
    return gpus() * max(1, min(WORKERS_A_GPU, memory // MEMORY_A_WORKER))


def device_of_worker() -> str:
    """The device a task computes on: a GPU where there is one, the workers taking turns at choosing."""
    if not gpus():
        return "cpu"
    return f"cuda:{_number_of_worker() % gpus()}"


def decoding_threads() -> int:
    """Threads that read and decode beside the encoder: a GPU's share of the cores; none where the encoder needs the core."""
    return max(1, cores() // gpus()) if gpus() else 0


def _number_of_worker() -> int:
    """Of a local cluster's worker; 0 in other processes (a cluster's own launcher shows each worker its GPU)."""
    if "distributed" not in sys.modules:
        return 0
    from distributed import get_worker

    try:
        name = str(get_worker().name)
    except ValueError:
        return 0
    return int(name) if name.isdecimal() else 0


def keep_memory() -> None:
    """Tells glibc to keep what is freed, for the next batch, which needs as much.

    By default it gives large blocks back, and the kernel has to find and zero their pages anew for every layer's output: that
    is a fifth of the time of a ViT-B on a CPU.
    """
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, KEPT)
        mallopt(M_MMAP_MAX, 0)


@contextmanager
def _client(workers: int | None, scheduler: str | None, imports: Sequence[str]) -> Iterator[Any]:
    import dask

    # Read when `distributed` is first imported: its start and stop messages would break the progress line.
    dask.config.set(
        {
            "logging": {"distributed": "critical", "tornado": "critical"},
            "distributed.worker.preload": ["featurize.execution.interrupt"],
            "distributed.worker.multiprocessing-method": "spawn" if gpus() else "forkserver",
            # As keep_memory does, for a worker's thread too. Dask's own setting is the opposite.
            "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": KEPT,
            "distributed.nanny.pre-spawn-environ.MALLOC_MMAP_MAX_": 0,
            "distributed.nanny.pre-spawn-environ.MALLOC_ARENA_MAX": 1,
        }
    )
    from distributed import Client, LocalCluster

    if scheduler is not None:
        try:
            client = Client(scheduler, timeout="20s", set_as_default=False)
        except (OSError, TimeoutError, ValueError):
            raise UserError(f"No Dask scheduler answers at {scheduler}; check --scheduler ADDRESS.") from None
        with client:
            log.info("Dask: %s, dashboard %s", scheduler, client.dashboard_link)
            yield client
        return
    if not gpus():  # see `engine`
        from distributed.utils import get_mp_context

        get_mp_context().set_forkserver_preload(["distributed", *imports])
    count = default_workers() if workers is None else workers
    # Port 0: any that is free. Without bokeh there is no dashboard, only the scheduler's own pages.
    options: dict[str, Any] = {"n_workers": count, "threads_per_worker": 1, "dashboard_address": ":0"}
    try:
        cluster = LocalCluster(**options)
    except RuntimeError as error:
        raise UserError(
            f"The {count} workers could not be started ({error}): is memory or are processes short? Run the same command again, "
            "or with fewer --workers."
        ) from None
    with cluster, Client(cluster, set_as_default=False) as client:
        if importlib.util.find_spec("bokeh"):
            log.info("Dask: %d workers, dashboard %s", count, client.dashboard_link)
        yield client


def run_here(function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[tuple[int, R]]:
    """The tasks one after the other in this process."""
    for index, task in enumerate(tasks):
        yield index, _call(function, task)
        if asked_to_stop():
            raise KeyboardInterrupt


def _run_on(client: Any, function: Callable[[T], R], tasks: Iterator[T], is_local: bool) -> Iterator[tuple[int, R]]:
    from distributed import KilledWorker, wait

    waiting = enumerate(tasks)
    running: dict[Any, int] = {}

    def fill() -> None:
        """Only a few tasks are in the cluster at a time: memory stays bounded whatever the number of blocks."""
        threads = client.nthreads()
        # A cluster that grows on demand must see some demand; on this machine what is in hand is what is computed.
        ahead = max(1, sum(threads.values())) if is_local else 2 * sum(threads.values()) + 8
        while len(running) < ahead and not asked_to_stop():
            index, task = next(waiting, (None, None))
            if index is None:
                return
            future = client.submit(_call, function, task, pure=False)
            running[future] = index

    try:
        fill()
        while running:
            if asked_to_stop():
                _drop_waiting(client, running)
            try:
                with client.as_current():
                    done = wait(list(running), timeout=PATIENCE, return_when="FIRST_COMPLETED").done
            except TimeoutError:
                if client.cluster is not None:  # of this machine: a worker that died while it started is started again
                    client.cluster.scale(len(client.cluster.worker_spec))
                continue
            for future in done:
                index = running.pop(future)
                try:
                    result = future.result()
                except KilledWorker:
                    raise UserError(
                        "A worker died several times over one block of rows (out of memory?); what is done is kept, "
                        "run the same command again with fewer --workers."
                    ) from None
                fill()
                yield index, result
        if asked_to_stop():
            raise KeyboardInterrupt
    finally:
        client.cancel(list(running))


def _drop_waiting(client: Any, running: dict[Any, int]) -> None:
    """Take back the tasks that no worker has begun."""
    begun = {key for stacks in client.call_stack().values() for key in stacks} if running else set()
    dropped = [future for future in running if future.key not in begun and not future.done()]
    client.cancel(dropped)
    for future in dropped:
        running.pop(future)


def _call(function: Callable[[T], R], task: T) -> R:
    from threadpoolctl import threadpool_limits

    # One thread a task: sums are made in the same order whatever the number of cores, and workers don't fight for them.
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
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
