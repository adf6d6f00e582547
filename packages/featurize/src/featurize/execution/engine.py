"""Chooses what carries out the tasks: this process, processes of this machine, or a Dask cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from featurize.execution.devices import default_workers, keep_memory
from featurize.execution.tasks import Run, run_here


@contextmanager
def engine(workers: int | None, scheduler: str | None, imports: Sequence[str] = ()) -> Iterator[Run]:
    """`workers` processes of this machine (None: one per core, or four per GPU; 0: this very process), or the Dask cluster at
    `scheduler`. They are started when the first task comes. A task's result never depends on which of them ran it.

    `imports` are modules that take long to import and that the tasks need.
    """
    if scheduler is not None:
        from featurize.execution.cluster import dask_cluster

        with dask_cluster(scheduler) as run:
            yield run
    elif workers == 0:
        keep_memory()
        yield run_here
    else:
        from featurize.execution.local import local_workers

        with local_workers(default_workers() if workers is None else workers, imports) as run:
            yield run
