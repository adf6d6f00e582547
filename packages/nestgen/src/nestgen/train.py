"""Trains the denoiser of one level from the stored latents, through Accelerate."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from nestgen import losses
from nestgen.checkpoint import Checkpoint, save_checkpoint
from nestgen.denoiser import Denoiser, denoiser_config
from nestgen.errors import UserError
from nestgen.feed import Batch, Feed, make_batch, open_feed, prefetch
from nestgen.process import process_of
from nestgen.recipe import Recipe, TrainingOptions, run_dir
from nestgen.run import describe, find_checkpoint, lay_folder

LOG_EVERY = 10  # steps


def train(recipe: Recipe, level: int) -> None:
    """Trains D_level to `training.steps`, going on from the newest whole checkpoint of its run.

    Raises UserError for bad states, and KeyboardInterrupt after SIGINT or SIGTERM, once the checkpoint of the
    step then under way is written.
    """
    if not 0 <= level < len(recipe.levels):
        raise UserError(f"level {level} is not within 0..{len(recipe.levels) - 1}, the levels of {recipe.file}")
    recipe = _with_known_precision(recipe)
    accelerator = start_accelerator(recipe.training)
    feed, folder = open_feed(recipe, level), run_dir(recipe, level)
    meta = describe(feed)
    checkpoint = find_checkpoint(folder, meta, accelerator.print)
    first, last = checkpoint.step if checkpoint else 0, recipe.training.steps
    if first >= last:
        accelerator.print(f"{folder} is complete at step {first}; nothing to do")
        return
    training = Training(accelerator, feed, checkpoint)
    if accelerator.is_main_process:
        parameters = sum(p.numel() for p in training.denoiser.parameters())
        lay_folder(folder, recipe.file, meta, parameters, first)
    if checkpoint:
        accelerator.print(f"{folder} goes on from step {first}")
    _run(training, folder, meta, first, last)
    if accelerator.is_main_process:
        losses.draw(folder / "log.jsonl", folder / "loss.png", f"{recipe.name}: {folder.name}")
    accelerator.end_training()


def start_accelerator(options: TrainingOptions) -> Accelerator:
    """This process alone, or among those that `accelerate launch` or `torchrun` started."""
    # Without being told, Accelerate takes every process that torchrun starts on a CPU for the only one.
    on_cpu = "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
    try:
        accelerator = Accelerator(mixed_precision=options.precision, cpu=on_cpu)
    except ValueError as error:
        raise UserError(f"training.precision {options.precision} cannot be had here: {error}") from None
    if options.precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("training.precision fp16 needs a GPU; set bf16 or no")
    if options.batch % accelerator.num_processes:
        raise UserError(
            f"training.batch {options.batch} does not divide among {accelerator.num_processes} processes; "
            "set a multiple of them"
        )
    return accelerator


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


def learning_rate(options: TrainingOptions, step: int) -> float:
    """Of the optimiser step that follows `step` steps: linear warm-up, then constant."""
    return options.lr * min(1.0, (step + 1) / max(1, options.warmup))


def ema_decay(options: TrainingOptions, step: int) -> float:
    """Of the same step: (1 + step) / (10 + step) up to `ema`, so that a short run forgets its start."""
    return min(options.ema, (1 + step) / (10 + step))


def initial_denoiser(recipe: Recipe, level: int) -> Denoiser:
    """A level's denoiser with its first weights, which depend on the recipe and the level only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed * 1000 + level)
        return Denoiser(denoiser_config(recipe, level))


class Training:
    """The state of a training: the denoiser, the average of its weights, and the optimiser."""

    def __init__(self, accelerator: Accelerator, feed: Feed, checkpoint: Checkpoint | None) -> None:
        recipe, device = feed.recipe, accelerator.device
        self.accelerator, self.feed, self.options = accelerator, feed, recipe.training
        self.process = process_of(recipe, feed.level)
        self.denoiser = initial_denoiser(recipe, feed.level).to(device)
        self.weights: dict[str, Tensor] = dict(self.denoiser.named_parameters())
        self.average = {name: weight.detach().clone() for name, weight in self.weights.items()}
        optimizer = torch.optim.AdamW(
            self.weights.values(),
            lr=self.options.lr,
            betas=self.options.betas,
            weight_decay=self.options.weight_decay,
            fused=True,
        )
        # The learning rate is set by hand: a prepared scheduler would count processes, not steps.
        self.model, self.optimizer = accelerator.prepare(self.denoiser, optimizer)
        if checkpoint:
            self._load(checkpoint)

    def batches(self, first: int, last: int) -> Generator[Batch]:
        """This process's share of the batches of steps first..last - 1."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        return prefetch(lambda step: make_batch(self.feed, step, process, processes), first, last)

    def step(self, batch: Batch, step: int) -> Tensor:
        """The optimiser step that follows `step` steps; returns the loss before it, of this process's share."""
        batch = batch.each(lambda tensor: tensor.to(self.accelerator.device, non_blocking=True))
        z_t_BCHW = self.process.add_noise(batch.z_BCHW, batch.eps_BCHW, batch.t_B)
        told_B = self.process.told(batch.t_B).to(z_t_BCHW.device)
        output_BCHW = self.model(z_t_BCHW, told_B, **batch.given())
        value = self.process.loss(output_BCHW, batch.z_BCHW, batch.eps_BCHW, batch.t_B)
        self.accelerator.backward(value)
        if self.options.clip is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.options.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.options, step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            averages, weights = list(self.average.values()), list(self.weights.values())
            torch._foreach_lerp_(averages, weights, 1 - ema_decay(self.options, step))
        return value.detach()

    def save(self, folder: Path, meta: dict[str, Any], step: int) -> None:
        """Writes the checkpoint of a step: the main process does, the others wait for it."""
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = self.optimizer.state_dict()["state"]
            parts: dict[str, dict[str, Tensor]] = {
                "denoiser": self.weights,
                "ema": self.average,
                "optimizer": {
                    f"{name}.{key}": value
                    for number, name in enumerate(self.weights)
                    for key, value in state[number].items()
                },
            }
            meta = {**meta, "step": step, "scaler": scaler.state_dict() if scaler else None}
            save_checkpoint(folder, parts, meta, self.options.keep)
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def _load(self, checkpoint: Checkpoint) -> None:
        for target, part in ((self.weights, "denoiser"), (self.average, "ema")):
            tensors = checkpoint.load(part)
            for name, value in target.items():
                value.copy_(tensors[name])
        tensors = checkpoint.load("optimizer")
        state: dict[int, dict[str, Tensor]] = {
            number: {key: tensors[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            for number, name in enumerate(self.weights)
        }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if self.accelerator.scaler and checkpoint.meta["scaler"]:
            self.accelerator.scaler.load_state_dict(checkpoint.meta["scaler"])


def _run(training: Training, folder: Path, meta: dict[str, Any], first: int, last: int) -> None:
    """Steps first..last - 1 with their log lines and checkpoints."""
    accelerator, options = training.accelerator, training.options
    total, counted, begun = torch.zeros((), device=accelerator.device), 0, time.perf_counter()
    bar = tqdm(
        initial=first,
        total=last,
        unit="step",
        desc=folder.name,
        mininterval=0.2 if sys.stderr.isatty() else 10,
        disable=not accelerator.is_main_process,
    )
    with bar, closing(training.batches(first, last)) as batches, stop_signals() as stop_asked:
        for step, batch in enumerate(batches, first + 1):
            total += training.step(batch, step - 1)
            counted += 1
            stop = _agree(accelerator, stop_asked(), step)
            save = stop or step == last or step % options.checkpoint_every == 0
            if save or step % LOG_EVERY == 0:
                mean = accelerator.reduce(total, "mean").item() / counted
                if not math.isfinite(mean):
                    raise UserError(
                        f"the loss is {mean} at step {step} of {folder}; the last checkpoint is from before: "
                        "lower training.lr or set training.clip or another training.precision"
                    )
                rate = counted * options.batch / (time.perf_counter() - begun)
                if accelerator.is_main_process:
                    record = {"step": step, "loss": mean, "lr": learning_rate(options, step - 1)}
                    losses.append(folder / "log.jsonl", {**record, "samples_per_second": round(rate, 1)})
                bar.set_postfix_str(f"loss {mean:.4f}, {rate:.0f} samples/s", refresh=False)
                total, counted, begun = torch.zeros_like(total), 0, time.perf_counter()
            bar.update()
            if save:
                training.save(folder, meta, step)
                begun = time.perf_counter()
            if stop and step < last:
                raise KeyboardInterrupt(
                    f"stopped after step {step} of {last}, kept in {folder}: the same command goes on from there"
                )


def _agree(accelerator: Accelerator, stop: bool, step: int) -> bool:
    """Whether any process was asked to stop; several ask each other only every LOG_EVERY steps."""
    if accelerator.num_processes == 1:
        return stop
    if step % LOG_EVERY:
        return False
    return accelerator.reduce(torch.tensor(float(stop), device=accelerator.device), "sum").item() > 0


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
