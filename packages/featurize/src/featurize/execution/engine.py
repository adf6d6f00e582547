"""Chooses what carries out the tasks: this process, processes of this machine, or a Dask cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from featurize.errors import UserError
from featurize.execution.devices import default_workers, keep_memory, request_decoders
from featurize.execution.tasks import Run, run_here


@contextmanager
def engine(
    workers: int | None, scheduler: str | None, imports: Sequence[str] = (), decoders: int | None = None
) -> Iterator[Run]:
    """`workers` processes of this machine (None: one per GPU, else per core; 0: this very process), or the Dask cluster at
    `scheduler`. They are started when the first task comes. A task's result never depends on which of them ran it.

    `imports` are modules that take long to import and that the tasks need. `decoders` processes read and decode images for
    each worker (None: a GPU's share of the cores, and none on a CPU).
    """
    if scheduler is not None:
        from featurize.execution.cluster import dask_cluster

        if decoders is not None:
            raise UserError(
                "--decoders is for workers of this machine; those of a cluster take their share of the cores."
            )
        with dask_cluster(scheduler) as run:
            yield run
    elif workers == 0:
        from featurize.execution.decoders import end_decoders

        keep_memory()
        request_decoders(decoders)
        try:
            yield run_here
        finally:
            end_decoders()
            request_decoders(None)
    else:
        from featurize.execution.local import local_workers

        with local_workers(default_workers() if workers is None else workers, imports, decoders) as run:
            yield run
