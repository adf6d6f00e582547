"""Trains the denoiser of one level from the stored latents, through Accelerate."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from nestgen.denoiser.config import bottleneck_warning
from nestgen.denoiser.flops import count
from nestgen.denoiser.pretrained import read_weights
from nestgen.errors import LostPartner, UserError
from nestgen.files import sha256_of
from nestgen.recipe.recipe import Recipe, run_dir
from nestgen.recipe.sections import TrainingOptions
from nestgen.runs import loss_log as losses
from nestgen.runs.ema_snapshots import save_snapshot
from nestgen.runs.folder import best_step, describe, find_checkpoint, lay_folder, only_training, write_status
from nestgen.training.feed import Feed, make_batch, open_feed, prefetch
from nestgen.training.launch import follow_the_parent
from nestgen.training.preview import Preview, open_preview
from nestgen.training.progress import Progress
from nestgen.training.step import Trainer, initial_denoiser

LOG_EVERY = 10  # steps
PATIENCE = timedelta(minutes=30)  # of a process for its partners: a preview or a large checkpoint takes long


def train(recipe: Recipe, level: int, init: Path | None = None) -> None:
    """Trains D_level to `training.steps`, going on from the newest whole checkpoint of its run.

    `init` is a file of weights to begin with (warmstart.py). Raises UserError for bad states, and KeyboardInterrupt
    after SIGINT or SIGTERM, once the checkpoint of the step then under way is written.
    """
    if not 0 <= level < len(recipe.levels):
        raise UserError(f"level {level} is not within 0..{len(recipe.levels) - 1}, the levels of {recipe.file}")
    recipe = _with_known_precision(recipe)
    folder = run_dir(recipe, level)
    accelerator = start_accelerator(recipe.training, folder)
    feed = open_feed(recipe, level, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    with _partners(accelerator), only_training(folder) if accelerator.is_main_process else nullcontext():
        _train(accelerator, feed, folder, init)
    accelerator.end_training()


def _train(accelerator: Accelerator, feed: Feed, folder: Path, init: Path | None) -> None:
    recipe, level = feed.recipe, feed.level
    meta = describe(feed, sha256_of(init) if init else None)
    checkpoint = find_checkpoint(folder, meta, accelerator.print)
    first, last = checkpoint.step if checkpoint else 0, recipe.training.steps
    if first >= last:
        accelerator.print(f"{folder} is complete at step {first}; nothing to do")
        if accelerator.is_main_process and not (folder / "loss.png").is_file():  # killed after the last checkpoint
            _draw_losses(recipe, folder)
        return
    if checkpoint:
        meta["init"] = checkpoint.meta["init"]
        accelerator.print(f"{folder} goes on from step {first}")
    start = read_weights(init, initial_denoiser(recipe, level)) if init and not checkpoint else {}
    preview = open_preview(feed) if recipe.training.preview and accelerator.is_main_process else None
    trainer = Trainer(accelerator, feed, checkpoint, start)
    if recipe.training.trackers:
        values = {"run": folder.name, "seed": recipe.seed, **_flat(recipe.training)}
        accelerator.init_trackers(recipe.name, values, {"wandb": {"dir": str(folder), "name": folder.name}})
    accelerator.print(_plan(accelerator, feed))
    if warning := bottleneck_warning(trainer.denoiser.config):
        accelerator.print(f"warning: {warning}")
    if accelerator.is_main_process:
        lay_folder(folder, recipe.file, meta, _parameters(recipe, level), first)
        write_status(folder, meta, f"In training from step {first} to {last}")
    try:
        _run(trainer, feed, folder, meta, first, last, preview)
    finally:
        if accelerator.is_main_process:
            _draw_losses(recipe, folder)
            step = max((line["step"] for line in losses.read(folder / "log.jsonl")), default=first)
            state = f"Complete at step {last}" if step >= last else f"Stopped; `nestgen train --level {level}` goes on"
            write_status(folder, meta, state)


def _parameters(recipe: Recipe, level: int) -> int:
    return sum(weight.numel() for weight in initial_denoiser(recipe, level).parameters())


def _plan(accelerator: Accelerator, feed: Feed) -> str:
    """A line that says on what is trained: nobody should wonder how many processes there are."""
    options, processes = feed.recipe.training, accelerator.num_processes
    line = (
        f"{processes} process(es) on {accelerator.device.type}, batch {options.batch}"
        f"{f' ({options.batch // processes} each)' if processes > 1 else ''}, precision {options.precision}, "
        f"{feed.z.rows} rows from {feed.where}"
    )
    if (
        "ACCELERATE_MIXED_PRECISION" in os.environ
        and "LOCAL_RANK" not in os.environ
        and accelerator.device.type == "cpu"
    ):
        line += "; accelerate launch starts one process on CPUs, for more use `nestgen train --processes N`"
    return line


def _draw_losses(recipe: Recipe, folder: Path) -> None:
    log = folder / "log.jsonl"
    if losses.read(log):
        losses.draw(log, folder / "loss.png", f"{recipe.name}: {folder.name}", recipe.process.prediction)


def start_accelerator(options: TrainingOptions, folder: Path) -> Accelerator:
    """This process alone, or among those that `--processes`, `accelerate launch` or `torchrun` started."""
    follow_the_parent()
    for tracker in options.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise UserError(f"training.trackers names {tracker}, which is not installed; install nestgen[{tracker}]")
    # Without being told, Accelerate takes every process that torchrun starts on a CPU for the only one.
    on_cpu = "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
    try:
        accelerator = Accelerator(
            mixed_precision=options.precision,
            cpu=on_cpu,
            log_with=list(options.trackers) or None,
            project_dir=folder,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    except ValueError as error:
        raise UserError(f"training.precision {options.precision} cannot be had here: {error}") from None
    if options.precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("training.precision fp16 needs a GPU; set bf16 or no")
    if options.batch % (accelerator.num_processes * options.accumulate):
        raise UserError(
            f"training.batch {options.batch} does not divide among {accelerator.num_processes} processes"
            f"{f' of {options.accumulate} parts' if options.accumulate > 1 else ''}; set a multiple of them"
        )
    return accelerator


def _flat(options: TrainingOptions) -> dict[str, Any]:
    return {key: value if isinstance(value, int | float | str) else str(value) for key, value in options}


def _with_known_precision(recipe: Recipe) -> Recipe:
    """The recipe with bf16 or no in place of `auto`, so that a checkpoint records what it was trained in."""
    if recipe.training.precision != "auto":
        return recipe
    precision = "bf16" if has_bfloat16() else "no"
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"precision": precision})})


def has_bfloat16() -> bool:
    """Whether this machine computes in bfloat16 by instructions of its own: a CPU without them takes ten times as long."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _run(
    trainer: Trainer,
    feed: Feed,
    folder: Path,
    meta: dict[str, Any],
    first: int,
    last: int,
    preview: Preview | None,
) -> None:
    """Steps first..last - 1 with their log lines, checkpoints and previews."""
    accelerator, options = trainer.accelerator, trainer.options
    process, processes = accelerator.process_index, accelerator.num_processes
    pin = accelerator.device.type == "cuda"
    batches = prefetch(lambda step: make_batch(feed, step, process, processes, pin), first, last)
    # a training step is a forward pass and a backward one of twice its operations
    flops = 3e9 * count(trainer.denoiser.config).gflops_true
    progress = Progress(accelerator, options, folder, first, last, flops)
    with progress.bar, closing(batches), stop_signals() as stop_asked:
        for step, batch in enumerate(batches, first + 1):
            progress.add(trainer.step(batch, step - 1), step)
            stop = _agree(accelerator, stop_asked(), step)
            save = stop or step == last or step % options.checkpoint_every == 0
            if save or step % LOG_EVERY == 0:
                progress.report(step)
            if options.ema_snapshots and step % options.ema_snapshots == 0:
                save_snapshot(trainer, folder, step)
            if save and progress.skipped_in_a_row == 0:  # what diverges is not kept
                progress.pause()
                trainer.save(folder, meta, step, best_step(folder))
                if preview and not stop:
                    progress.track(preview.draw(folder, step), step)
                if accelerator.is_main_process:
                    write_status(folder, meta, f"In training, at step {step} of {last}")
                progress.resume()
            if stop and step < last:
                raise KeyboardInterrupt(
                    f"stopped after step {step} of {last}, kept in {folder}: the same command goes on from there"
                )
    if progress.skipped_in_a_row:
        raise UserError(
            f"the gradient of the last {progress.skipped_in_a_row} step(s) of {folder} was not finite, so that they are "
            "not kept; lower training.lr or set training.clip"
        )


def _agree(accelerator: Accelerator, stop: bool, step: int) -> bool:
    """Whether any process was asked to stop; several ask each other only every LOG_EVERY steps."""
    if accelerator.num_processes == 1:
        return stop
    if step % LOG_EVERY:
        return False
    return accelerator.reduce(torch.tensor(float(stop), device=accelerator.device), "sum").item() > 0


@contextmanager
def _partners(accelerator: Accelerator) -> Iterator[None]:
    """Turns what the other processes' end raises here into LostPartner."""
    try:
        yield
    except RuntimeError as error:
        if accelerator.num_processes > 1 and re.search(r"gloo|nccl|connection|broken pipe|timed out", str(error), re.I):
            raise LostPartner(
                "another process of this training ended or was not heard of for "
                f"{PATIENCE.seconds // 60} minutes; the same command goes on from the last checkpoint"
            ) from None
        raise


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within it, the first SIGINT and the first SIGTERM only set what the yielded function tells."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(number, before[number])  # a second one is not put off

    before = {int(number): signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
