"""Trains the denoiser of one level from the stored latents, through Accelerate."""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import Accelerator

from nestgen.denoiser.config import DenoiserConfig, bottleneck_warning
from nestgen.denoiser.memory import check_batch
from nestgen.denoiser.pretrained import read_weights
from nestgen.denoiser.uvit import Denoiser, initial_denoiser
from nestgen.diffusion.process import level_process
from nestgen.errors import UserError
from nestgen.files import atomic_write, json_sha256, sha256_of
from nestgen.recipe.locations import run_dir
from nestgen.recipe.recipe import Recipe
from nestgen.recipe.sections import TrainingOptions
from nestgen.runs import loss_log, scores
from nestgen.runs.checkpoint import Checkpoint
from nestgen.runs.folder import (
    describe_run,
    find_checkpoint,
    is_scored,
    prepare_folder,
    training_lock,
    write_status,
)
from nestgen.training.accelerator import check_alike, lost_processes, start_accelerator, with_actual_precision
from nestgen.training.batches import TrainingData, open_training_data
from nestgen.training.loop import run_steps
from nestgen.training.moments import fit_gaussian
from nestgen.training.numbers import NEWEST, NUMBERS
from nestgen.training.preview import open_preview
from nestgen.training.step import Trainer


def train(recipe: Recipe, level: int, init: Path | None = None, requested: Collection[str] = ()) -> None:
    """Trains D_level to `training.steps`, going on from the newest checkpoint of its run.

    `init` is a file with the first weights (denoiser/pretrained.py). `requested` are training options that may be others
    than those the run was started with: lr, warmup, clip and steps. Raises UserError for what cannot be trained, and
    KeyboardInterrupt after SIGINT or SIGTERM, once the checkpoint of the step under way is written.
    """
    recipe.check_level(level)
    folder = run_dir(recipe, level)
    recipe = with_actual_precision(recipe, folder)
    accelerator = start_accelerator(recipe.training, folder)
    data = open_training_data(recipe, level, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    with lost_processes(accelerator), training_lock(folder) if accelerator.is_main_process else nullcontext():
        _train(accelerator, data, folder, init, requested)
    accelerator.end_training()


def _train(
    accelerator: Accelerator, data: TrainingData, folder: Path, init: Path | None, requested: Collection[str]
) -> None:
    recipe, level = data.recipe, data.level
    meta = describe_run(recipe, level, data.stores, sha256_of(init) if init else None)
    checkpoint = find_checkpoint(folder, meta, requested)
    decisive = {key: value for key, value in meta.items() if key != "versions"}
    digest = json_sha256([decisive, checkpoint.meta if checkpoint else None])
    check_alike(accelerator, folder, checkpoint.step if checkpoint else 0, digest)
    # A run goes on with the random numbers it was started with. Those of earlier commits are numpy's and have no name.
    meta["numbers"] = checkpoint.meta.get("numbers", "numpy") if checkpoint else NEWEST
    if meta["numbers"] not in NUMBERS:
        raise UserError(
            f"{folder} was started with random numbers `{meta['numbers']}`, which this nestgen does not have; go on with the "
            "version that started it, or remove the folder"
        )
    data = replace(data, numbers=meta["numbers"])
    first, last = checkpoint.step if checkpoint else 0, recipe.training.steps
    if first >= last:
        accelerator.print(f"{folder} is complete at step {first}; nothing to do")
        if accelerator.is_main_process:  # killed after the last checkpoint
            scores.truncate(folder, first)  # which also removes a line that was cut off
            if recipe.training.preview and not is_scored(folder, first):
                open_preview(recipe, level, data.stores).sample(folder, first, accelerator.device)
            if not (folder / "loss.png").is_file():
                _draw_losses(recipe, folder)
        return
    if checkpoint:
        meta["init"] = checkpoint.meta["init"]
        remark = (
            "" if meta["numbers"] == NEWEST else f", with the random numbers it was started with ({meta['numbers']}'s)"
        )
        accelerator.print(f"{folder} goes on from step {first}{remark}")
    denoiser = _first_denoiser(data, init, checkpoint)
    parameters = sum(weight.numel() for weight in denoiser.parameters())
    previews = recipe.training.preview and accelerator.is_main_process
    preview = open_preview(recipe, level, data.stores) if previews else None
    process, micro_batch = level_process(recipe, level), recipe.training.micro_batch_of(level)
    _check_memory(accelerator, denoiser.config, recipe.training, micro_batch)
    trainer = Trainer(accelerator, denoiser, process, recipe.training, checkpoint, micro_batch)
    if recipe.training.trackers:
        by_wandb = accelerator.is_main_process and "wandb" in recipe.training.trackers
        options = {"wandb": _wandb(folder)} if by_wandb else {}
        values = {"run": folder.name, "seed": recipe.seed, **_plain(recipe)}
        accelerator.init_trackers(recipe.name, values, options)
    accelerator.print(_summary(accelerator, data))
    if warning := bottleneck_warning(denoiser.config):
        accelerator.print(f"warning: {warning}")
    if accelerator.is_main_process:
        prepare_folder(folder, recipe.file, meta, parameters, first)
        write_status(folder, meta, f"In training from step {first} to {last}")
    if preview and checkpoint and not is_scored(folder, first):  # killed before its preview, and it may be the best
        preview.sample(folder, first, accelerator.device)
    try:
        run_steps(trainer, data, folder, meta, range(first, last), preview)
    finally:
        if accelerator.is_main_process:
            _draw_losses(recipe, folder)
            complete = (folder / "checkpoints" / f"{last:08d}").is_dir()  # what diverged is logged, and not saved
            state = f"Complete at step {last}" if complete else f"Stopped; `nestgen train --level {level}` goes on"
            write_status(folder, meta, state)


def _check_memory(
    accelerator: Accelerator, config: DenoiserConfig, options: TrainingOptions, micro_batch: int | None
) -> None:
    """Raises UserError for a batch that cannot fit, before the first step tries it."""
    samples, checkpointed = options.batch // accelerator.num_processes, options.checkpoint_activations
    setting = "training.micro_batch" if micro_batch else "training.batch, or training.micro_batch,"
    check_batch(
        config,
        min(micro_batch or samples, samples),
        accelerator.device,
        setting,
        training=True,
        checkpointed=checkpointed,
    )
    values = sum(math.prod(shape) for shape in (config.shape, *config.condition_shapes))
    if samples * values * 4 > (memory := psutil.virtual_memory().total):
        raise UserError(
            f"the latents of {samples:,} samples do not fit into the memory of this machine, {memory / 1e9:.0f} GB; set "
            f"training.batch to less than {memory // (4 * values):,}"
        )


def _wandb(folder: Path) -> dict[str, str]:
    """Options of wandb, by which a run that goes on is the same run there: its name is kept in the folder."""
    file = folder / "wandb-id"
    if not file.is_file():
        with atomic_write(file) as draft:
            draft.write_text(uuid.uuid4().hex)
    return {"dir": str(folder), "name": folder.name, "id": file.read_text(), "resume": "allow"}


def _first_denoiser(data: TrainingData, init: Path | None, checkpoint: Checkpoint | None) -> Denoiser:
    """The denoiser with what is not trained: the empty caption, and the linear part, which is that of a checkpoint.

    Its weights are the first ones, those of the file `init` where it has any.
    """
    denoiser = initial_denoiser(data.recipe, data.level)
    if denoiser.config.gaussian:
        if init:
            raise UserError(
                f"{init} holds a network that predicts all by itself, and denoiser.gaussian of {data.recipe.file} one that "
                "adds to the linear part; leave one of them out"
            )
        if checkpoint:
            named = checkpoint.load("denoiser")
            parts = {name: named[f"gaussian.{name}"] for name in denoiser.gaussian.state_dict()}
            denoiser.gaussian.load_state_dict(parts)
        else:
            fit_gaussian(denoiser.gaussian, data)
    if init and not checkpoint:
        denoiser.load_state_dict(read_weights(init, denoiser), strict=False)
    if data.stores.captions is not None:
        null_TD = data.stores.captions.text.read(np.array([0]))[0]
        denoiser.null_context.copy_(torch.from_numpy(null_TD.astype(np.float32)))
    return denoiser


def _plain(recipe: Recipe) -> dict[str, int | float | str]:
    """The training options as trackers take them."""
    return {key: value if isinstance(value, int | float | str) else str(value) for key, value in recipe.training}


def _summary(accelerator: Accelerator, data: TrainingData) -> str:
    """A line that says what the training runs on, above all in how many processes."""
    options, processes = data.recipe.training, accelerator.num_processes
    line = (
        f"{processes} process(es) on {accelerator.device.type}, batch {options.batch}"
        f"{f' ({options.batch // processes} each)' if processes > 1 else ''}, precision {options.precision}, "
        f"{data.stores.z.rows} rows from {data.read_from}"
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
    if loss_log.read(log):
        loss_log.draw_curve(log, folder / "loss.png", f"{recipe.name}: {folder.name}", recipe.process.prediction)
