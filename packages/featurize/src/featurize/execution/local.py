"""Processes of this machine, each with a pipe to this one: a task goes in, its result comes out.

The standard library's pools give up all their processes when one dies, and do not say which. Here a dead one costs the task
it had: it is named, another takes its place, and the task is done again.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar, cast

import psutil

from featurize.errors import UserError
from featurize.execution import devices, stalls
from featurize.execution.interrupt import SIGNALS, signals_later, stop_requested
from featurize.execution.stalls import watch_for_stalls
from featurize.execution.tasks import Run, call

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)

MAX_DEATHS = 6  # of workers over one task, before the run stops


@dataclass(frozen=True)
class _Worker:
    """One process and this end of its pipe."""

    number: int
    process: BaseProcess
    pipe: Connection


@contextmanager
def local_workers(count: int, imports: Sequence[str]) -> Iterator[Run]:
    """A `Run` on `count` processes, each of which is started when there is a task for it.

    `imports` are modules that take long to import: the workers are forked from one process that has them (it has no threads
    yet, so forking it is safe). Not where there are GPUs: importing timm initialises CUDA, and then no fork of the
    process may use it.
    """
    context = multiprocessing.get_context("spawn" if devices.gpus() else "forkserver")
    if not devices.gpus():
        context.set_forkserver_preload([__name__, *imports])
    workers: dict[int, _Worker] = {}
    busy: dict[Connection, tuple[_Worker, int, Any]] = {}

    def next_worker() -> _Worker:
        """One that is idle, or a new one."""
        idle = next((worker for worker in workers.values() if worker.pipe not in busy), None)
        return idle or _start(next(number for number in range(count) if number not in workers), count, context, workers)

    def end(worker: _Worker) -> None:
        """Its task, if it has one, is given up."""
        del workers[worker.number]
        worker.pipe.close()
        worker.process.kill()
        worker.process.join()

    def run(function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[tuple[int, R]]:
        waiting = enumerate(tasks)
        again: deque[tuple[int, T]] = deque()
        deaths: Counter[int] = Counter()

        watch, used = watch_for_stalls(), dict[_Worker, float]()

        def movements() -> dict[str, bool]:
            """Whether each busy worker has used its core since the last call."""
            moved = {}
            for worker, _, _ in busy.values():
                with suppress(psutil.Error):  # it has just died, as `wait` will show
                    seconds = sum(psutil.Process(worker.process.pid).cpu_times()[:2])
                    moved[_name(worker)] = seconds - used.get(worker, 0.0) > stalls.LEAST * stalls.LOOK
                    used[worker] = seconds
            return moved

        def fill() -> None:
            while len(busy) < count and not stop_requested():
                # Last, when most else is done and memory is free, what a worker died over.
                job = next(waiting, None) or (again.popleft() if again else None)
                if job is None:
                    return
                worker = next_worker()
                busy[worker.pipe] = (worker, *job)
                with suppress(BrokenPipeError):  # it died idle, as `wait` will show
                    worker.pipe.send((function, job[1]))

        try:
            fill()
            while busy:
                ready = wait(list(busy), stalls.LOOK)
                watch(movements)
                for pipe in ready:
                    worker, index, task = busy[cast(Connection, pipe)]
                    try:
                        succeeded, result = worker.pipe.recv()
                    except (EOFError, OSError):
                        deaths[index] += 1
                        del busy[worker.pipe], workers[worker.number]
                        _report_death(worker, deaths[index])
                        again.append((index, task))
                        fill()
                        continue
                    del busy[worker.pipe]
                    if not succeeded:
                        raise result
                    fill()
                    yield index, result
            if stop_requested():
                raise KeyboardInterrupt
        finally:
            for worker, _, _ in busy.values():
                end(worker)
            busy.clear()

    try:
        yield run
    finally:
        for worker in list(workers.values()):
            end(worker)


def _start(number: int, count: int, context: Any, workers: dict[int, _Worker]) -> _Worker:
    """A new process, entered into `workers`. Raises UserError where the machine has none to give."""
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(number, there), name=f"worker {number + 1}", daemon=True)
    try:
        resource_tracker.ensure_running()  # now, as it would let the signals through again
        with signals_later():
            if context.get_start_method() == "forkserver":
                forkserver.ensure_running()
            process.start()
            workers[number] = _Worker(number, process, here)  # before a signal comes, so that it is ended
    except (OSError, EOFError) as error:
        raise UserError(
            f"Worker {number + 1} of {count} could not be started ({error}): is memory or are processes short? Run the same "
            "command again, or with fewer --workers."
        ) from None
    there.close()
    return workers[number]


def _serve(number: int, pipe: Connection) -> None:
    """A worker's life: it does tasks until the main process ends it, or has ended itself."""
    for name in SIGNALS:  # a terminal and a batch system send them to all processes, and only the main one is to react
        signal.signal(name, signal.SIG_IGN)
    devices.become_worker(number)
    devices.keep_memory()
    threading.Thread(target=_end_with_main_process, daemon=True).start()
    with suppress(EOFError, ConnectionError):  # the main process has closed its end: there is nothing more to do
        while True:
            function, task = pipe.recv()
            try:
                answer: tuple[bool, Any] = (True, call(function, task))
            except BaseException as error:
                answer = (False, _portable(error))
            pipe.send(answer)


def _end_with_main_process() -> None:
    """Even in the middle of a task: another run may have the store by then."""
    main = multiprocessing.parent_process()
    assert main is not None
    main.join()
    os._exit(1)


def _portable(error: BaseException) -> BaseException:
    """The error as it can be sent: with its traceback as a note, and as text where it can't be pickled."""
    trace = "".join(traceback.format_exception(error))
    error.add_note(f"\nIn a worker:\n{trace}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(trace)
    return error


def _name(worker: _Worker) -> str:
    return f"Worker {worker.number + 1} (process {worker.process.pid})"


def _report_death(worker: _Worker, deaths: int) -> None:
    """Say which worker died of what. Raises UserError when workers die over one task again and again."""
    worker.pipe.close()
    worker.process.join()
    code = worker.process.exitcode or 0
    cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    name = f"{_name(worker)} died ({cause})"
    if deaths >= MAX_DEATHS:
        raise UserError(
            f"{name}; {deaths} workers died over one block of rows: is memory short? What is done is kept; run the same command "
            "again with fewer --workers."
        )
    log.warning("%s; its block is done again.", name)
