"""A sample folder: latents level by level from the top down, then images; what is there is not sampled again."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nestgen.denoiser.memory import check_batch
from nestgen.errors import UserError
from nestgen.files import free_bytes, write_json
from nestgen.images import draw_sheet, read_images, write_image
from nestgen.recipe.recipe import Recipe
from nestgen.sampling.blocks import DOOR, USERS, BlockSampler, Workers, open_workers
from nestgen.sampling.card import check_folder, check_same_work, make_card, reconcile
from nestgen.sampling.conditions import Request
from nestgen.sampling.decoder import load_decoder
from nestgen.sampling.descent import default_device, images_at_once, together
from nestgen.sampling.latents import create_latents, open_latents
from nestgen.sampling.trained import SavedLevel, find_levels


def sample(
    recipe: Recipe, out: Path, request: Request, processes: int = 1, levels: tuple[SavedLevel, ...] | None = None
) -> None:
    """Samples images 0 to count - 1 into `out`: 000000.png, ..., sample.json and latents/; and OUT-sheet.png.

    `levels` are the denoisers, by default the newest of the recipe's run.

    Goes on where an earlier run stopped, and joins runs that sample the same at the same time. If the request says so, a
    level is sampled again where its settings or those of a level above changed. Otherwise they raise UserError, as does a
    folder of anything else than samples, or one that is being sampled into with other settings.
    """
    block_sampler = _open(recipe, out, request, processes, levels)
    if processes == 1:
        _ = block_sampler.decoder  # before anything is sampled: its weights may be missing
    else:
        load_decoder(block_sampler.samplers[0].trained.meta["codec"], request.vae)
    card = _card(block_sampler)
    _check_room(block_sampler)
    with _entered(block_sampler, card, 0):
        with open_workers(block_sampler, processes) as workers:
            _sample_levels(block_sampler, workers, 0)
            blocks = list(open_latents(out, 0).blocks())
            with _bar("images", request.count, request.count) as bar:
                workers(None, blocks, bar)
        with block_sampler.locks.held(DOOR, wait=True):
            _finish(out, card)


def sample_latents(recipe: Recipe, out: Path, request: Request, lowest: int) -> None:
    """Samples only the latents of a folder, from the top down to level `lowest`, going on as `sample` does."""
    block_sampler = _open(recipe, out, request, 1, None)
    with _entered(block_sampler, _card(block_sampler), lowest), open_workers(block_sampler, 1) as workers:
        _sample_levels(block_sampler, workers, lowest)


def _open(
    recipe: Recipe, out: Path, request: Request, processes: int, levels: tuple[SavedLevel, ...] | None
) -> BlockSampler:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("`nestgen sample` starts its own processes: run it once, with --processes N")
    device = default_device() if processes == 1 else torch.device("cpu")
    if recipe.sampling.precision is None:  # that of the devices that will sample, which this process may not use
        recipe = recipe.with_sampling({"precision": "bf16" if default_device().type == "cuda" else "float32"})
    block_sampler = BlockSampler(recipe, request, out, find_levels(recipe) if levels is None else levels, device)
    _ = block_sampler.conditions  # before anything is written: what was requested may not be there
    return block_sampler


def _check_room(block_sampler: BlockSampler) -> None:
    """Raises UserError for a batch that no memory holds, and for latents that the disk has no room for."""
    request, configs = block_sampler.request, [sampler.config for sampler in block_sampler.samplers]
    for config in configs:
        check_batch(config, request.batch, block_sampler.device, "--batch-size", training=False)
    out = block_sampler.out.resolve()
    there = sum(file.stat().st_size for file in (out / "latents").rglob("*") if file.is_file())
    needed = 4 * request.count * sum(math.prod(config.shape) for config in configs) - there
    if needed > (free := free_bytes(out)):
        raise UserError(
            f"the latents of {request.count:,} samples take {needed / 1e9:,.3g} GB more, and the disk of {out} has "
            f"{free / 1e9:,.3g} GB left; sample fewer, or with --out on another disk"
        )


def _card(block_sampler: BlockSampler) -> dict[str, Any]:
    recipe, request = block_sampler.recipe, block_sampler.request
    return make_card(recipe, block_sampler.samplers, block_sampler.conditions, request.count, request.batch)


@contextmanager
def _entered(block_sampler: BlockSampler, card: dict[str, Any], lowest: int) -> Iterator[None]:
    """Makes the folder ready for a run down to a level, or joins the runs that are in it, and sets the card's batch.

    Only who is alone may change what is there. Raises UserError for a folder that cannot be gone on with or joined.
    """
    out, request = block_sampler.out, block_sampler.request
    check_folder(out)
    locks = block_sampler.locks
    with locks.file:  # which releases all of them
        with locks.held(DOOR, wait=True):
            if locks.lock(USERS):
                card["batch"] = reconcile(out, card, request.overwrite)
                for sampler in block_sampler.samplers[lowest:]:
                    create_latents(out, sampler.level, (request.count, *sampler.config.shape), card["batch"])
            else:
                card["batch"] = check_same_work(out, card, locks.user())
            locks.lock(USERS, shared=True, wait=True)
            locks.sign()
        yield


def _sample_levels(block_sampler: BlockSampler, workers: Workers, lowest: int) -> None:
    """Samples the blocks that are not there, level by level from the top down."""
    for sampler in reversed(block_sampler.samplers[lowest:]):
        level = sampler.level
        images = images_at_once(block_sampler.samplers, level, block_sampler.request.batch)
        runs = together(list(open_latents(block_sampler.out, level).blocks()), images)
        todo = [rows for rows in runs if not block_sampler.has(level, rows)]
        with _bar(f"z_{level}", block_sampler.request.count, sum(map(len, todo))) as bar:
            workers(level, todo, bar)


def _bar(name: str, count: int, left: int) -> tqdm:
    """A progress bar of images, which moves by parts of them within a batch."""
    return tqdm(
        desc=name,
        total=count,
        initial=count - left,
        unit=" images",
        bar_format="{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
    )


def _finish(out: Path, card: dict[str, Any]) -> None:
    """Writes the sheet of the first images, then sample.json: a folder that has it is whole."""
    # The sheet stands beside the folder, which holds the samples and no other image, so that it can be encoded.
    sheet = out.resolve().with_name(f"{out.resolve().name}-sheet.png")
    shown = min(card["count"], 64)
    if not sheet.is_file() or not (out / "sample.json").is_file():
        images = read_images(out, shown)
        write_image(draw_sheet([images[first : first + 8] for first in range(0, shown, 8)]), sheet)
        os.sync()  # the images are on the disk before the card that vouches for them
        write_json(out / "sample.json", card)
    print(f"{card['count']} samples of {card['depth']} level(s) in {out}, the first {shown} in {sheet}")
