"""Blocks of a sample folder's images, sampled and decoded by this process or by several."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.queues import Queue
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from nestgen.compiler import compile_in_place, missing_compiler
from nestgen.cores import cores
from nestgen.denoiser.memory import sampling_memory
from nestgen.errors import UserError
from nestgen.images import image_path, is_whole, write_image
from nestgen.locks import PartLocks, open_locks
from nestgen.memory import keep_freed_memory
from nestgen.recipe.recipe import Recipe
from nestgen.sampling.conditions import ImageConditions, Request, open_conditions
from nestgen.sampling.decoder import Decoder, load_decoder
from nestgen.sampling.descent import sample_in_batches
from nestgen.sampling.latents import open_latents
from nestgen.sampling.trained import LevelSampler, SavedLevel, load_samplers

COMPILED = 4096  # images from which compiling the denoisers, which takes minutes, is worth it on a GPU
PAUSE = 0.5  # seconds before blocks of other processes are looked at again

# Parts of a sample folder that are locked: by who makes it ready or finishes it, and by all who sample into it.
DOOR, USERS = range(1), range(1, 2)


def rows_of_level(level: int | None, rows: range) -> range:
    """The parts that are locked while some rows of a level, or their images (None), are made."""
    first = (1 if level is None else level + 2) << 32
    return range(first + rows.start, first + rows.stop)


@dataclass(frozen=True)
class BlockSampler:
    """What samples blocks of images of a sample folder; every process has its own."""

    recipe: Recipe
    request: Request
    out: Path
    levels: tuple[SavedLevel, ...]
    device: torch.device

    @cached_property
    def samplers(self) -> tuple[LevelSampler, ...]:
        """The denoisers, z_0's first; compiled where that pays."""
        samplers = load_samplers(self.recipe, self.device, self.levels)
        if self.device.type == "cuda" and self.request.count >= COMPILED and not missing_compiler(self.device):
            for sampler in samplers:
                compile_in_place(sampler.trained.denoiser)
        return samplers

    @cached_property
    def conditions(self) -> ImageConditions:
        """Classes, captions and frozen levels of the images."""
        return open_conditions(self.recipe, self.samplers, self.request)

    @cached_property
    def decoder(self) -> Decoder:
        """From z_0 to images."""
        codec = self.samplers[0].trained.meta["codec"]
        return load_decoder(codec, self.request.vae, str(self.device))

    @cached_property
    def locks(self) -> PartLocks:
        """Of the folder: DOOR, USERS and `rows_of_level`."""
        return open_locks(self.out)

    def run(self, level: int | None, rows: range, callback: Callable[[float], object]) -> bool:
        """Sees to a level of some blocks, or to their images (None); False while another process works at them.

        `callback` gets how many images each network call was: of one call in ten, a tenth of its batch.
        """
        with self.locks.held(rows_of_level(level, rows)) as ours:
            if not ours:
                return False
            _look_again(self.out if level is None else open_latents(self.out, level).records)
            if self.has(level, rows):
                callback(len(rows))
            elif level is None:
                self.decode(rows)
                callback(len(rows))
            else:
                self.sample(level, rows, callback)
        return True

    def has(self, level: int | None, rows: range) -> bool:
        """Whether a level of some blocks, or their images (None), are there."""
        if level is None:
            return all(is_whole(image_path(self.out, index)) for index in rows)
        latents = open_latents(self.out, level)
        return all(map(latents.has, latents.blocks(rows)))

    def sample(self, level: int, rows: range, callback: Callable[[float], object]) -> None:
        """Samples a level of some blocks and writes those that are not there, given the levels above, which the folder has."""
        conditions, latents, batch = self.conditions, open_latents(self.out, level), self.request.batch
        needed = () if level in conditions.stores else self.recipe.conditions(level)
        above = {one: open_latents(self.out, one).read(rows) for one in needed}

        def report(level: int, indices: Sequence[int], call: int, t: float, x_BCHW: Tensor) -> None:
            callback(len(indices) / self.samplers[level].settings.steps)

        with sampling_memory(min(batch, len(rows)), self.device):
            z_BCHW = sample_in_batches(self.samplers, rows, conditions, batch, above, report, [level])[level]
        for block in latents.blocks(rows):
            if not latents.has(block):
                latents.write(block, z_BCHW[block.start - rows.start : block.stop - rows.start])

    def decode(self, rows: range) -> None:
        """Writes the images of a block; several threads make the PNGs."""
        paths = (image_path(self.out, index) for index in rows)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for z_BCHW in open_latents(self.out, 0).read(rows).split(self.request.batch):
                written = pool.map(write_image, images := self.decoder(z_BCHW), islice(paths, len(images)))
                deque(written, maxlen=0)


# Works on (level, or None for images; runs of blocks; bar to move) until they are there.
Workers = Callable[[int | None, Sequence[range], tqdm], None]


@contextmanager
def open_workers(block_sampler: BlockSampler, processes: int) -> Iterator[Workers]:
    """What works on some blocks of a level: this process, or several that it starts.

    Other commands, on other machines too, may work on the same: each run of blocks is locked by who samples it, and looked
    at again if that one ended without it.
    """
    if processes == 1:

        def here(level: int | None, runs: Sequence[range], bar: tqdm) -> None:
            def move(images: float) -> None:  # sums of parts of images end a little above or below the total
                bar.update(min(images, float(bar.total or 0) - float(bar.n)))

            while runs := _paused([rows for rows in runs if not block_sampler.run(level, rows, move)], bar):
                pass

        yield here
        return
    context = get_context("spawn")  # forked threads of torch hang
    numbers: Queue[int] = context.Queue()
    for number in range(processes):
        numbers.put(number)
    threads = max(1, cores() // processes)
    # The levels as they were found here: a training may write a newer checkpoint meanwhile.
    start = (block_sampler.recipe, block_sampler.request, block_sampler.out, block_sampler.levels, numbers, threads)
    already = set(active_children())
    with ProcessPoolExecutor(processes, context, _start, start) as pool:

        def among(level: int | None, runs: Sequence[range], bar: tqdm) -> None:
            try:
                while runs:
                    with _ctrl_c_held_back():
                        running: dict[Future[bool], range] = {pool.submit(_run, level, rows): rows for rows in runs}
                    others = []
                    while running:
                        for one in wait(running, return_when=FIRST_COMPLETED).done:
                            rows = running.pop(one)
                            if one.result():
                                bar.update(len(rows))
                            else:
                                others.append(rows)
                    runs = _paused(others, bar)
            except BrokenProcessPool:
                raise UserError(
                    "one of the processes was killed, perhaps for lack of memory; the same command goes on, "
                    "with fewer --processes or a smaller --batch-size"
                ) from None
            except BaseException:
                # Also those that still start, and would miss what this process takes with it.
                for process in set(active_children()) - already:
                    process.terminate()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

        yield among


@contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Ctrl-C waits; processes that the first `submit` starts inherit that, and import torch without a traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _look_again(folder: Path) -> None:
    """Makes NFS ask what is in a folder, which it believes to know: another machine may just have written there."""
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        next(entries, None)


def _paused(others: list[range], bar: tqdm) -> list[range]:
    """The runs that other processes work on, after a pause if there are any; the bar says so."""
    bar.set_postfix_str(f"{sum(map(len, others))} images with other processes" if others else "")
    if others:
        time.sleep(PAUSE)
    return others


_block_sampler: BlockSampler  # of a process that `open_workers` started


def _start(
    recipe: Recipe, request: Request, out: Path, levels: tuple[SavedLevel, ...], numbers: Queue[int], threads: int
) -> None:
    """Loads the denoisers on a GPU of the process's own, if there are any."""
    global _block_sampler
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process ends the others
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    torch.set_num_threads(threads)
    keep_freed_memory()
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", numbers.get() % gpus) if gpus else torch.device("cpu")
    _block_sampler = BlockSampler(recipe, request, out, levels, device)
    # Held here too, so that no run clears the folder before this process has ended with a killed parent.
    _block_sampler.locks.lock(USERS, shared=True, wait=True)


def _end_with_the_parent() -> None:
    """However the parent ends, even in the middle of a block: the executor's own end needs a parent that lives."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(level: int | None, rows: range) -> bool:
    return _block_sampler.run(level, rows, lambda images: None)
