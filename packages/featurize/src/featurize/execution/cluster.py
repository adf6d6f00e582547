"""A Dask cluster that is there already: `--scheduler ADDRESS` (docs/cluster.md)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from featurize.errors import UserError
from featurize.execution import stalls
from featurize.execution.interrupt import stop_requested
from featurize.execution.stalls import watch_for_stalls
from featurize.execution.tasks import Run, call

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)

TIMEOUT = 20  # seconds for the scheduler to answer
POLL = 10.0  # seconds without a finished task, after which Ctrl-C is looked for


@contextmanager
def dask_cluster(scheduler: str) -> Iterator[Run]:
    """A `Run` on the cluster's workers. Raises UserError where no scheduler answers."""
    import dask

    # Read when `distributed` is first imported: its start and stop messages would break the progress line.
    dask.config.set({"logging": {"distributed": "critical", "tornado": "critical"}})
    from distributed import Client, Security

    if scheduler.startswith("tls://") and Security().get_connection_args("client").get("ssl_context") is None:
        raise UserError(
            f"{scheduler} wants a certificate, and Dask's configuration on this machine names none; docs/cluster.md shows how to "
            "make one."
        )
    try:
        client = Client(scheduler, timeout=f"{TIMEOUT}s", set_as_default=False)
    except (OSError, TimeoutError, ValueError):
        raise UserError(f"No Dask scheduler answers at {scheduler}; check --scheduler ADDRESS.") from None
    with client:
        log.info("Dask: %s, dashboard %s", scheduler, client.dashboard_link)

        def run(function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[tuple[int, R]]:
            yield from _run_on(client, function, tasks)

        yield run


def _run_on(client: Any, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[tuple[int, R]]:
    from distributed import CancelledError, KilledWorker, wait
    from distributed.comm import CommClosedError

    waiting = enumerate(tasks)
    running: dict[Any, int] = {}
    watch = watch_for_stalls()

    def fill() -> None:
        """Only a few tasks are in the cluster at a time: memory stays bounded whatever the number of blocks."""
        # A cluster that grows on demand must see some demand.
        ahead = 2 * sum(client.nthreads().values()) + 8
        while len(running) < ahead and not stop_requested():
            index, task = next(waiting, (None, None))
            if index is None:
                return
            future = client.submit(call, function, task, pure=False)
            running[future] = index

    try:
        fill()
        while running:
            if stop_requested():
                _drop_waiting(client, running)
            watch(lambda: _movements(client))
            try:
                with client.as_current():
                    done = wait(list(running), timeout=POLL, return_when="FIRST_COMPLETED").done
            except TimeoutError:
                if client.status not in ("running", "newly-created"):
                    raise CancelledError from None
                continue
            for future in done:
                index = running.pop(future)
                try:
                    result = future.result()
                except KilledWorker:
                    raise UserError(
                        "Workers died several times over one block of rows: is memory short? What is done is kept; run the same "
                        "command again with fewer workers on each machine."
                    ) from None
                fill()
                yield index, result
        if stop_requested():
            raise KeyboardInterrupt
    except (CancelledError, CommClosedError):  # so end the futures whose scheduler is gone
        raise UserError(
            f"The Dask scheduler at {client.scheduler.address} died or can't be reached any more; what is done is kept. Start it "
            "and its workers again, and run the same command."
        ) from None
    finally:
        if client.status == "running":
            client.cancel(list(running))


def _movements(client: Any) -> dict[str, bool]:
    """Of each worker with a task whether its process has been heard of, and has used a core, lately."""

    def look(
        seconds: float, percent: float, dask_scheduler: Any
    ) -> dict[str, bool]:  # sent whole: featurize may not be there
        import time

        return {
            f"Dask's worker {worker.name} at {worker.address} ({worker.status.name})": (
                time.time() - worker.last_seen < seconds and worker.metrics.get("cpu", 0.0) > percent
            )
            for worker in dask_scheduler.workers.values()
            if worker.processing
        }

    try:
        return client.run_on_scheduler(look, stalls.LOOK, 100 * stalls.LEAST)
    except (OSError, TimeoutError):  # it is gone, as `wait` will show
        return {}


def _drop_waiting(client: Any, running: dict[Any, int]) -> None:
    """Take back the tasks that no worker has begun."""
    begun = {key for stacks in client.call_stack().values() for key in stacks} if running else set()
    dropped = [future for future in running if future.key not in begun and not future.done()]
    client.cancel(dropped)
    for future in dropped:
        running.pop(future)
