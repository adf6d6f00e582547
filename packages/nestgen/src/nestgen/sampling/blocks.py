"""Blocks of a sample folder's images, sampled and decoded by this process or by several."""

from __future__ import annotations

import math
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from nestgen.denoiser.memory import sampling_memory
from nestgen.errors import UserError
from nestgen.images import image_path, is_whole, write_image
from nestgen.memory import keep_freed_memory
from nestgen.recipe.recipe import Recipe
from nestgen.sampling.conditions import ImageConditions, Request, open_conditions
from nestgen.sampling.decoder import Decoder, load_decoder
from nestgen.sampling.descent import sample_images
from nestgen.sampling.latents import open_latents
from nestgen.sampling.trained import LevelSampler, SavedLevel, load_samplers

MOST = 1024  # images of an upper level that are sampled together
COMPILED = 4096  # images from which compiling the denoisers, which takes minutes, is worth it on a GPU


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
        if self.device.type == "cuda" and self.request.count >= COMPILED:
            for sampler in samplers:
                sampler.trained.denoiser.compile()
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

    def run(self, level: int | None, rows: range, callback: Callable[[int], object]) -> None:
        """Samples a level of a block, or decodes its images (None); `callback` gets the images of each network call."""
        if level is None:
            self.decode(rows)
            callback(len(rows))
        else:
            self.sample(level, rows, callback)

    def sample(self, level: int, rows: range, callback: Callable[[int], object]) -> None:
        """Samples a level of some blocks and writes those that are not there, given the levels above, which the folder has."""
        conditions, latents = self.conditions, open_latents(self.out, level)
        batch = images_at_once(self.samplers, level, self.request.batch)
        needed = () if level in conditions.stores else self.recipe.conditions(level)
        above = {one: open_latents(self.out, one).read(rows) for one in needed}

        def report(level: int, call: int, t: float, x_BCHW: Tensor) -> None:
            callback(len(x_BCHW))

        parts = []
        for first in range(0, len(rows), batch):
            part = slice(first, first + batch)
            above_BCHW = {one: z_BCHW[part] for one, z_BCHW in above.items()}
            with sampling_memory(len(rows[part]), self.device):
                z = sample_images([self.samplers[level]], rows[part], conditions, above_BCHW, report)
            parts.append(z[level].cpu())
        z_BCHW = torch.cat(parts)
        for block in latents.blocks(rows):
            if not latents.has(block):
                latents.write(block, z_BCHW[block.start - rows.start : block.stop - rows.start])

    def decode(self, rows: range) -> None:
        """Writes the images of a block, unless all are there; several threads make the PNGs."""
        if all(is_whole(image_path(self.out, index)) for index in rows):
            return
        paths = (image_path(self.out, index) for index in rows)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for z_BCHW in open_latents(self.out, 0).read(rows).split(self.request.batch):
                written = pool.map(write_image, images := self.decoder(z_BCHW), islice(paths, len(images)))
                deque(written, maxlen=0)


def images_at_once(samplers: Sequence[LevelSampler], level: int, batch: int) -> int:
    """How many images of a level are sampled together: as many as need the memory of `batch` of z_0, at most MOST.

    A batch of an upper level, which has few tokens, would leave a GPU idle.
    """
    values = [(math.prod(one.config.grid) + 1) * one.config.dim for one in (samplers[0], samplers[level])]
    return batch if level == 0 else max(batch, min(MOST, batch * values[0] // values[1]))


def together(blocks: Sequence[range], images: int) -> list[range]:
    """The blocks in runs of as many as make up `images` rows, those at the end that fill no such run one by one.

    So that the rows sampled together depend on nothing but the block's size, and a run that goes on samples the same bits.
    """
    blocks_per_run = max(1, images // len(blocks[0]))
    whole = len(blocks) // blocks_per_run if len(blocks[-1]) == len(blocks[0]) else (len(blocks) - 1) // blocks_per_run
    firsts = range(0, whole * blocks_per_run, blocks_per_run)
    runs = [range(blocks[first].start, blocks[first + blocks_per_run - 1].stop) for first in firsts]
    return [*runs, *blocks[whole * blocks_per_run :]]


# Works on (level, or None for images; blocks; bar to move; network calls for an image).
Workers = Callable[[int | None, list[range], tqdm, int], None]


@contextmanager
def open_workers(block_sampler: BlockSampler, processes: int) -> Iterator[Workers]:
    """What works on some blocks of a level: this process, or several that it starts."""
    if processes == 1:

        def here(level: int | None, blocks: list[range], bar: tqdm, calls: int) -> None:
            for rows in blocks:
                block_sampler.run(level, rows, bar.update)

        yield here
        return
    context = get_context("spawn")  # forked threads of torch hang
    numbers: Queue[int] = context.Queue()
    for number in range(processes):
        numbers.put(number)
    threads = max(1, (os.cpu_count() or 1) // processes)
    # The levels as they were found here: a training may write a newer checkpoint meanwhile.
    start = (block_sampler.recipe, block_sampler.request, block_sampler.out, block_sampler.levels, numbers, threads)
    with ProcessPoolExecutor(processes, context, _start, start) as pool:

        def among(level: int | None, blocks: list[range], bar: tqdm, calls: int) -> None:
            running: dict[Future[None], range] = {pool.submit(_run, level, rows): rows for rows in blocks}
            try:
                while running:
                    for one in wait(running, return_when=FIRST_COMPLETED).done:
                        one.result()
                        bar.update(len(running.pop(one)) * calls)
            except BrokenProcessPool:
                raise UserError(
                    "one of the processes was killed, perhaps for lack of memory; the same command goes on, "
                    "with fewer --processes or a smaller --batch-size"
                ) from None
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

        yield among


_block_sampler: BlockSampler  # of a process that `open_workers` started


def _start(
    recipe: Recipe, request: Request, out: Path, levels: tuple[SavedLevel, ...], numbers: Queue[int], threads: int
) -> None:
    """Loads the denoisers on a GPU of the process's own, if there are any."""
    global _block_sampler
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process ends the others
    torch.set_num_threads(threads)
    keep_freed_memory()
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", numbers.get() % gpus) if gpus else torch.device("cpu")
    _block_sampler = BlockSampler(recipe, request, out, levels, device)


def _run(level: int | None, rows: range) -> None:
    _block_sampler.run(level, rows, lambda images: None)
