"""Processes that read and decode images for this one, so that the GPU which it keeps busy need not wait.

One process can't: its threads wait for the interpreter's lock. A job goes to a process by a pipe, and what is large of the
result comes back in a slot of memory that both see, from which a GPU copies by itself.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import util
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np

from featurize.errors import UserError
from featurize.execution.devices import device_of_worker
from featurize.execution.local import MAX_DEATHS, Worker, cause_of_death, end_worker, serve, start_worker

T = TypeVar("T")
R = TypeVar("R")
Function = Callable[[T, np.ndarray], R]  # takes a job and a slot

log = logging.getLogger(__name__)

SLOT = 8 << 20  # bytes of a slot
SLOTS_PER_DECODER = 2  # one is filled while the other waits to be taken

_memory = np.zeros((0, SLOT), dtype=np.uint8)  # in a decoder: the slots of the process that it decodes for


@dataclass(frozen=True)
class _Decoders:
    """The processes, each started and driven by a thread of its own, and the slots (number, SLOT) that they fill.

    `free` holds the numbers of the slots that nobody uses. Jobs of one caller come before those of the next: who puts them in
    line has `turn`.
    """

    threads: ThreadPoolExecutor
    shared: Any  # ctypes array, which other processes can be given
    memory: np.ndarray
    free: SimpleQueue[int]
    processes: dict[int, Worker] = field(default_factory=dict)  # by the thread that drives it
    turn: threading.Lock = field(default_factory=threading.Lock)
    starting: threading.Lock = field(default_factory=threading.Lock)
    ended: threading.Event = field(default_factory=threading.Event)


_decoders: _Decoders | None = None
_beginning = threading.Lock()


def decoded(function: Function[T, R], jobs: Iterable[T], count: int) -> Generator[tuple[R, np.ndarray], None, None]:
    """For each job, in their order, `function(job, slot)` as one of `count` processes computes it, and the slot, uint8 (SLOT,).

    A slot holds until the next one is asked for. A few jobs are done ahead, as many as there are slots for. A process that dies
    is named, and its job is done again by another one; raises UserError where they die over one job again and again.
    """
    own = _begin(count, function.__module__)
    waiting: deque[tuple[Future[R], int]] = deque()

    def finished() -> Iterator[tuple[R, np.ndarray]]:
        future, slot = waiting.popleft()
        try:
            yield future.result(), own.memory[slot]
        finally:
            own.free.put(slot)

    try:
        with own.turn:
            for job in jobs:
                while waiting and own.free.empty():
                    yield from finished()
                slot = own.free.get()
                waiting.append((own.threads.submit(_ask, own, partial(_fill, function), (job, slot)), slot))
        while waiting:
            yield from finished()
    finally:  # nobody takes the rest
        for future, slot in waiting:
            future.add_done_callback(lambda _, slot=slot: own.free.put(slot))  # type: ignore[misc]
            future.cancel()


def end_decoders() -> None:
    """End the processes, if there are any."""
    global _decoders
    own, _decoders = _decoders, None
    if own is not None:
        own.ended.set()
        own.threads.shutdown(wait=False, cancel_futures=True)
        for process in list(own.processes.values()):
            end_worker(process)
        own.threads.shutdown()


def _begin(count: int, module: str) -> _Decoders:
    """The decoders of this process, begun when they are first needed; `module` is what they import before they are many."""
    global _decoders
    with _beginning:
        if _decoders is None:
            # Without a name, so that nothing is left of it whatever kills these processes.
            shared = multiprocessing.get_context("forkserver").RawArray(
                ctypes.c_uint8, SLOTS_PER_DECODER * count * SLOT
            )
            memory = np.ctypeslib.as_array(shared).reshape(-1, SLOT)
            _pin(memory)
            free: SimpleQueue[int] = SimpleQueue()
            for slot in range(len(memory)):
                free.put(slot)
            multiprocessing.get_context("forkserver").set_forkserver_preload([__name__, module])
            util.Finalize(None, end_decoders, exitpriority=1)  # else the end of this process would wait for them
            _decoders = _Decoders(ThreadPoolExecutor(count, thread_name_prefix="decoder"), shared, memory, free)
        return _decoders


def _pin(memory: np.ndarray) -> None:
    """Let the GPU copy from this memory by itself, where there is one: else its copies keep this process waiting."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        with torch.cuda.device(device_of_worker()):
            torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)


def _ask(own: _Decoders, function: Callable[[T], R], task: T) -> R:
    """The function's result, computed in the process of this thread; in this one where it may start none, as in a worker of
    Dask's nanny."""
    if multiprocessing.current_process().daemon:
        global _memory
        _memory = own.memory
        return function(task)
    for _ in range(MAX_DEATHS):
        process = _own_process(own)
        try:
            process.pipe.send((0, function, task))
            _, succeeded, result = process.pipe.recv()
        except (EOFError, OSError):
            del own.processes[threading.get_ident()]
            if own.ended.is_set():
                raise
            name = f"Decoder {process.number + 1} (process {process.process.pid}) died ({cause_of_death(process)})"
            log.warning("%s; its images are decoded again.", name)
            continue
        if not succeeded:
            raise result
        return result
    raise UserError(
        f"{name}; {MAX_DEATHS} decoders died over the same images: is memory short? What is done is kept; run the same command "
        "again with fewer --decoders."
    )


def _own_process(own: _Decoders) -> Worker:
    """The process that this thread drives."""
    thread = threading.get_ident()
    if thread not in own.processes:
        context = multiprocessing.get_context("forkserver")  # never a fork of this process, which has threads
        with own.starting:
            number = min(set(range(len(own.processes) + 1)) - {process.number for process in own.processes.values()})
            started: dict[int, Worker] = {}
            start_worker(f"Decoder {number + 1}", context, started, number, _serve, (own.shared,))
            own.processes[thread] = started[number]
    return own.processes[thread]


def _serve(pipe: Connection, shared: Any) -> None:
    """A decoder's life."""
    global _memory
    _memory = np.ctypeslib.as_array(shared).reshape(-1, SLOT)
    serve(pipe)


def _fill(function: Function[T, R], task: tuple[T, int]) -> R:
    job, slot = task
    return function(job, _memory[slot])
