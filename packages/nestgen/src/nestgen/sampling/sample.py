"""A sample folder: latents level by level from the top down, then pictures; what is there is not drawn again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from nestgen.errors import UserError
from nestgen.files import write_json
from nestgen.images import draw_sheet, image_path, read_images, write_image
from nestgen.recipe.recipe import Recipe
from nestgen.sampling.captions import Prompts, check_encoder, check_text, open_prompts
from nestgen.sampling.card import Request, describe, settle
from nestgen.sampling.decoder import Decoder, load_decoder
from nestgen.sampling.descent import device, labels_of, sample_below
from nestgen.sampling.latents import create_latents, open_latents
from nestgen.sampling.real import frozen_levels, labels_of_rows, open_source
from nestgen.sampling.trained import Model, check_labels, load_models
from nestgen.stores.store import Store


@dataclass(frozen=True)
class Drawer:
    """Draws blocks of images of a sample folder; every process has one of its own."""

    recipe: Recipe
    request: Request
    out: Path
    models: tuple[Model, ...]

    @cached_property
    def stores(self) -> dict[int, Store]:
        """Of the levels frozen to real rows."""
        source = self.request.source
        fingerprints = [model.weights.meta["stores"][f"z{model.level}"] for model in self.models]
        return open_source(self.recipe, source, self.request.count, fingerprints) if source else {}

    @cached_property
    def decoder(self) -> Decoder:
        """From z_0 to pictures."""
        return load_decoder(self.models[0].weights.meta["codec"], self.request.vae, str(self.models[0].device))

    def work(self, level: int | None, rows: range, callback: Callable[[int], object]) -> None:
        """Draws a level of a block of images, or its pictures (None); `callback` gets images per network call."""
        if level is None:
            self.decode(rows)
            callback(len(rows))
        else:
            self.draw(level, rows, callback)

    def draw(self, level: int, rows: range, callback: Callable[[int], object]) -> None:
        """Draws a level of a block of images, given the levels above it."""
        above = {one: open_latents(self.out, one).read(rows) for one in self._above(level)}
        parts = []
        for first in range(0, len(rows), self.request.batch):
            part = slice(first, first + self.request.batch)
            parts.append(self._level(level, rows[part], {one: z[part] for one, z in above.items()}, callback))
        open_latents(self.out, level).write(rows, torch.cat(parts))

    def _above(self, level: int) -> range:
        """The levels that condition a level, if it is drawn and not frozen."""
        frozen = self.request.source is not None and level >= self.request.source.freeze_from
        return range(0) if frozen else self.recipe.conditions(level)

    def _level(self, level: int, indices: range, above: dict[int, Tensor], callback: Callable[[int], object]) -> Tensor:
        request, source = self.request, self.request.source
        if level in self.stores:
            assert source is not None
            return frozen_levels({level: self.stores[level]}, source, indices, request.seed)[level]
        one_image = source is not None and source.root is None
        if one_image and source is not None and level >= source.freeze_from:
            given = (self.labels(range(1)), self.context(range(1)))
            frozen = sample_below(self.models[level:], [0], request.seed, {}, *given)[level]
            return frozen.cpu().expand(len(indices), *frozen.shape[1:])
        tick = partial(callback, len(indices))
        given = (self.labels(indices), self.context(indices))
        drawn = sample_below([self.models[level]], indices, request.seed, above, *given, lambda *call: tick())
        return drawn[level].cpu()

    def labels(self, indices: range) -> Tensor | None:
        """Class of each image: the one asked for, that of the row it is like, or one drawn from (seed, i)."""
        source = self.request.source
        if source is not None and self.request.label is None:
            if source.root is not None:
                return labels_of_rows(self.recipe, source, self.stores[source.freeze_from], indices)
            zeros = [0] * len(indices)
            return labels_of(self.models, zeros, self.request.seed, None)
        return labels_of(self.models, indices, self.request.seed, self.request.label)

    @cached_property
    def prompts(self) -> Prompts | None:
        """What the images are captioned with."""
        request, text = self.request, self.recipe.denoiser.text
        check_text(self.recipe, request.prompts)
        if not request.prompts or not text:
            return None
        prompts = open_prompts(request.prompts, text, request.prompt)
        check_encoder(prompts, self.models[0].weights.denoiser.null_context, self.recipe)
        return prompts

    def context(self, indices: Sequence[int]) -> Tensor | None:
        """Embedded caption of each image; that of image 0 or of the real picture, where levels are frozen to it."""
        if self.prompts is None:
            return None
        source, like = self.request.source, None
        if source is not None and source.root is None:
            indices = [0] * len(indices)
        elif source is not None and self.prompts.are_of(self.stores[source.freeze_from]):
            like = source.rows_of(indices)
        return self.prompts.context(indices, self.request.seed, like)

    def decode(self, rows: range) -> None:
        """Writes the pictures of a block of images that are not all there."""
        if all(image_path(self.out, index).is_file() for index in rows):
            return
        indices = iter(rows)
        for z_BCHW in open_latents(self.out, 0).read(rows).split(self.request.batch):
            for picture, index in zip(self.decoder(z_BCHW), indices):
                write_image(picture, image_path(self.out, index))


def sample(recipe: Recipe, out: Path, request: Request, processes: int = 1) -> None:
    """Draws images 0 to count - 1 into `out`: 000000.png, ..., sample.json and latents/; and OUT-sheet.png.

    Goes on where an earlier run stopped; a level is drawn anew where its settings or those of a level above changed.
    Raises UserError for a folder of anything else than samples.
    """
    drawer = _open(recipe, out, request, processes)
    if processes == 1:
        _ = drawer.decoder  # before anything is drawn: its weights may be missing
    else:
        load_decoder(drawer.models[0].weights.meta["codec"], request.vae)
    card = describe(recipe, drawer.models, request, drawer.stores, drawer.prompts)
    card["batch"] = block = settle(out, card)
    with _workers(drawer, processes) as workers:
        _fill(drawer, workers, block, 0)
        blocks = list(open_latents(out, 0).blocks())
        with _bar("pictures", request.count, request.count, 1) as bar:
            workers(None, blocks, bar, 1)
    _finish(out, card)


def draw_levels(recipe: Recipe, out: Path, request: Request, lowest: int) -> None:
    """Draws only the latents of a sample folder, from the top down to a level, with the same care."""
    drawer = _open(recipe, out, request, 1)
    block = settle(out, describe(recipe, drawer.models, request, drawer.stores, drawer.prompts))
    with _workers(drawer, 1) as workers:
        _fill(drawer, workers, block, lowest)


def _open(recipe: Recipe, out: Path, request: Request, processes: int) -> Drawer:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("`nestgen sample` starts its own processes: run it once, with --processes N")
    drawer = Drawer(recipe, request, out, load_models(recipe, device() if processes == 1 else torch.device("cpu")))
    check_labels(drawer.models, request.label)
    return drawer


def _fill(drawer: Drawer, workers: Workers, block: int, lowest: int) -> None:
    """Draws the blocks that are not there, level by level from the top down."""
    for model in reversed(drawer.models[lowest:]):
        latents = create_latents(drawer.out, model.level, (drawer.request.count, *model.config.shape), block)
        todo = [rows for rows in latents.blocks() if not latents.has(rows)]
        calls = model.sampling.steps
        with _bar(f"z_{model.level}", drawer.request.count, sum(map(len, todo)), calls) as bar:
            workers(model.level, todo, bar, calls)


def _bar(name: str, count: int, left: int, calls: int) -> tqdm:
    """A progress bar that counts network calls, so that it moves within a batch, and shows images."""
    return tqdm(
        desc=name,
        total=count * calls,
        initial=(count - left) * calls,
        unit=" images",
        unit_scale=1 / calls,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}, {rate_fmt}]",
    )


# Works on (level, or None for pictures; blocks; bar to move; network calls an image takes).
Workers = Callable[[int | None, list[range], tqdm, int], None]


@contextmanager
def _workers(drawer: Drawer, processes: int) -> Iterator[Workers]:
    """What works on some blocks of a level: this process, or several of their own."""
    if processes == 1:

        def here(level: int | None, blocks: list[range], bar: tqdm, calls: int) -> None:
            for rows in blocks:
                drawer.work(level, rows, bar.update)

        yield here
        return
    context = get_context("spawn")  # forked threads of torch hang
    numbers: Queue[int] = context.Queue()
    for number in range(processes):
        numbers.put(number)
    threads = max(1, (os.cpu_count() or 1) // processes)
    start = (drawer.recipe, drawer.request, drawer.out, numbers, threads)
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
                    "one of the processes was killed, perhaps for want of memory; the same command goes on, "
                    "with fewer --processes or a smaller --batch-size"
                ) from None
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

        yield among


_drawer: Drawer  # of a process of its own


def _start(recipe: Recipe, request: Request, out: Path, numbers: Queue[int], threads: int) -> None:
    """Loads the models on the process's own GPU, if there are any."""
    global _drawer
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process ends the others
    torch.set_num_threads(threads)
    gpus = torch.cuda.device_count()
    place = torch.device("cuda", numbers.get() % gpus) if gpus else torch.device("cpu")
    _drawer = Drawer(recipe, request, out, load_models(recipe, place))


def _run(level: int | None, rows: range) -> None:
    _drawer.work(level, rows, lambda images: None)


def _finish(out: Path, card: dict[str, object]) -> None:
    """Writes the sheet of the first pictures, then sample.json: a folder that has it is whole."""
    # The sheet stands beside the folder, which holds the samples and no other picture, so that it can be encoded.
    sheet = out.resolve().with_name(f"{out.resolve().name}-sheet.png")
    shown = min(int(str(card["count"])), 64)
    if not sheet.is_file() or not (out / "sample.json").is_file():
        pictures = read_images(out, shown)
        write_image(draw_sheet([pictures[first : first + 8] for first in range(0, shown, 8)]), sheet)
        write_json(out / "sample.json", card)
    print(f"{card['count']} samples of {card['depth']} level(s) in {out}, the first {shown} in {sheet}")
