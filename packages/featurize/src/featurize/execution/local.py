"""Processes of this machine, each with a pipe to this one: a task goes in, its result comes out.

The standard library's pools give up all their processes when one dies, and do not say which. Here a dead one costs the tasks
it had: it is named, another takes its place, and they are done again.
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
from concurrent.futures import ThreadPoolExecutor
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
from featurize.execution.tasks import Run, call, one_thread

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)

MAX_DEATHS = 6  # of workers over one task, before the run stops


@dataclass(frozen=True)
class Worker:
    """One process and this end of its pipe: (index, function, task) goes in, (index, whether it succeeded, result) comes out."""

    number: int
    process: BaseProcess
    pipe: Connection


@contextmanager
def local_workers(count: int, imports: Sequence[str], decoders: int | None = None) -> Iterator[Run]:
    """A `Run` on `count` processes, each of which is started when there is a task for it.

    `imports` are modules that take long to import: the workers are forked from one process that has them (it has no threads
    yet, so forking it is safe). Not where there are GPUs: importing timm initialises CUDA, and then no fork of the
    process may use it. `decoders` processes of its own decode for each worker (None: as `devices.decoders` says).
    """
    context = multiprocessing.get_context("spawn" if devices.gpus() else "forkserver")
    if not devices.gpus():
        context.set_forkserver_preload([__name__, *imports])
    at_once = devices.tasks_per_worker()
    workers: dict[int, Worker] = {}
    busy: dict[Connection, tuple[Worker, dict[int, Any]]] = {}  # the tasks of each, by their index

    def next_worker() -> Worker:
        """One that is idle, or a new one, or the one with the fewest tasks."""
        idle = next((worker for worker in workers.values() if worker.pipe not in busy), None)
        if idle is not None or len(workers) == count:
            return idle or min(busy.values(), key=lambda one: len(one[1]))[0]
        number = next(number for number in range(count) if number not in workers)
        serving = (number, decoders, at_once)
        return start_worker(f"Worker {number + 1} of {count}", context, workers, number, _serve, serving)

    def end(worker: Worker) -> None:
        """Its tasks, if it has some, are given up."""
        del workers[worker.number]
        end_worker(worker)

    def run(function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[tuple[int, R]]:
        waiting = enumerate(tasks)
        again: deque[tuple[int, T]] = deque()
        deaths: Counter[int] = Counter()

        watch, used = watch_for_stalls(), dict[Worker, float]()

        def movements() -> dict[str, bool]:
            """Whether each busy worker has used its core since the last call."""
            moved = {}
            for worker, _ in busy.values():
                with suppress(psutil.Error):  # it has just died, as `wait` will show
                    seconds = sum(psutil.Process(worker.process.pid).cpu_times()[:2])
                    name = f"Worker {worker.number + 1} (process {worker.process.pid})"
                    moved[name] = seconds - used.get(worker, 0.0) > stalls.LEAST * stalls.LOOK
                    used[worker] = seconds
            return moved

        def fill() -> None:
            while sum(len(own) for _, own in busy.values()) < count * at_once and not stop_requested():
                # Last, when most else is done and memory is free, what a worker died over.
                job = next(waiting, None) or (again.popleft() if again else None)
                if job is None:
                    return
                worker = next_worker()
                index, task = job
                busy.setdefault(worker.pipe, (worker, {}))[1][index] = task
                with suppress(BrokenPipeError):  # it died idle, as `wait` will show
                    worker.pipe.send((index, function, task))

        try:
            fill()
            while busy:
                ready = wait(list(busy), stalls.LOOK)
                watch(movements)
                for pipe in ready:
                    worker, own = busy[cast(Connection, pipe)]
                    try:
                        index, succeeded, result = worker.pipe.recv()
                    except (EOFError, OSError):
                        deaths.update(list(own))
                        del busy[worker.pipe], workers[worker.number]
                        _report_death(worker, max(deaths[index] for index in own))
                        again.extend(own.items())
                        fill()
                        continue
                    del own[index]
                    if not own:
                        del busy[worker.pipe]
                    if not succeeded:
                        raise result
                    fill()
                    yield index, result
            if stop_requested():
                raise KeyboardInterrupt
        finally:
            for worker, _ in busy.values():
                end(worker)
            busy.clear()

    try:
        yield run
    finally:
        for worker in list(workers.values()):
            end(worker)


def start_worker(
    name: str,
    context: Any,
    workers: dict[int, Worker],
    number: int,
    serve: Callable[..., None],
    arguments: tuple[Any, ...],
) -> Worker:
    """A new process that calls `serve` with its pipe and the arguments, entered into `workers`.

    Raises UserError where the machine has none to give.
    """
    here, there = context.Pipe()
    # No daemon, as it may start processes to decode for it; whatever happens, it ends with this one (`_end_with_main_process`).
    process = context.Process(target=serve, args=(there, *arguments), name=name)
    try:
        resource_tracker.ensure_running()  # now, as it would let the signals through again
        with signals_later():
            if context.get_start_method() == "forkserver":
                forkserver.ensure_running()
            process.start()
            workers[number] = Worker(number, process, here)  # before a signal comes, so that it is ended
    except (OSError, EOFError) as error:
        raise UserError(
            f"{name} could not be started ({error}): is memory or are processes short? Run the same command again, or with "
            "fewer --workers."
        ) from None
    there.close()
    return workers[number]


def end_worker(worker: Worker) -> None:
    """End a process, whatever it does."""
    worker.pipe.close()
    worker.process.kill()
    worker.process.join()


def _serve(pipe: Connection, number: int, decoders: int | None = None, at_once: int = 1) -> None:
    """A worker's life."""
    devices.become_worker(number, decoders)
    devices.keep_memory()
    serve(pipe, at_once)


def serve(pipe: Connection, at_once: int = 1) -> None:
    """Do the tasks that come by a pipe, until the main process ends this one, or has ended itself."""
    for name in SIGNALS:  # a terminal and a batch system send them to all processes, and only the main one is to react
        signal.signal(name, signal.SIG_IGN)
    threading.Thread(target=_end_with_main_process, daemon=True).start()
    sending = threading.Lock()

    def carry_out(index: int, function: Callable[[Any], Any], task: Any) -> None:
        try:
            answer: tuple[int, bool, Any] = (index, True, call(function, task))
        except BaseException as error:
            answer = (index, False, _portable(error))
        with sending, suppress(ConnectionError):  # the main process may have closed its end
            pipe.send(answer)

    # For all of its life, as `call` would put the number of threads back under the other task's feet.
    with one_thread(), ThreadPoolExecutor(at_once) as pool, suppress(EOFError, ConnectionError):
        # In the main thread where it can be: what other threads free, glibc does not keep.
        begin: Callable[..., Any] = carry_out if at_once == 1 else lambda *job: pool.submit(carry_out, *job)
        while True:
            begin(*pipe.recv())


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


def _report_death(worker: Worker, deaths: int) -> None:
    """Say which worker died of what. Raises UserError when workers die over one task again and again."""
    name = f"Worker {worker.number + 1} (process {worker.process.pid}) died ({cause_of_death(worker)})"
    if deaths >= MAX_DEATHS:
        raise UserError(
            f"{name}; {deaths} workers died over one block of rows: is memory short? What is done is kept; run the same command "
            "again with fewer --workers."
        )
    log.warning("%s; its block is done again.", name)


def cause_of_death(worker: Worker) -> str:
    """What a process that is gone died of."""
    worker.pipe.close()
    worker.process.join()
    code = worker.process.exitcode or 0
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
