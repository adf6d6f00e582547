"""The loop: steps with their log lines, checkpoints and previews, until the last one or a signal."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from nestgen.denoiser.flops import count
from nestgen.errors import UserError
from nestgen.runs.folder import best_step, write_status
from nestgen.training.accelerator import out_of_memory
from nestgen.training.batches import Batch, TrainingData, finish_batch, make_batch, prefetch, read_batch
from nestgen.training.launch import SAME
from nestgen.training.preview import Preview
from nestgen.training.progress import Progress
from nestgen.training.step import Trainer, learning_rate

LOG_EVERY = 10  # steps


def run_steps(
    trainer: Trainer, data: TrainingData, folder: Path, meta: dict[str, Any], steps: range, preview: Preview | None
) -> None:
    """Takes the steps that follow `steps.start` others, up to step `steps.stop`.

    Raises KeyboardInterrupt once a signal has stopped it and the checkpoint is written, if the last gradients were finite,
    and UserError if those of the last step were not.
    """
    accelerator, options, saved, last = trainer.accelerator, trainer.options, steps.start, steps.stop
    device, processes = accelerator.device, accelerator.num_processes

    def prepare(step: int) -> Callable[[], Batch]:
        """In the background: all of a batch on a CPU, where a GPU is trained on what it does not do by itself."""
        share = data, step, accelerator.process_index, processes
        if device.type == "cpu":
            return partial(Batch.to, make_batch(*share), device)
        return partial(finish_batch, data, read_batch(*share).pin_memory(), device)

    batches = prefetch(prepare, steps.start, last)
    # a training step is a forward pass and a backward one of twice its operations
    flops = 3e9 * count(trainer.denoiser.config).gflops_true
    progress = Progress(accelerator, options, folder, steps.start, last, flops)
    with progress.bar, closing(batches), stop_signals() as stop_requested:
        for step, batch in enumerate(batches, steps.start + 1):
            with out_of_memory(options, trainer.micro_batch or options.batch // processes):
                result = trainer.step(batch(), step - 1)
            progress.add(result.loss, result.gradient_norm, result.finite)
            stop = _any_stops(accelerator, stop_requested(), step)
            save = stop or step == last or step % options.checkpoint_every == 0
            if save or step % LOG_EVERY == 0:
                progress.report(step, learning_rate(options, step - 1))
            if options.ema_snapshots and step % options.ema_snapshots == 0:
                trainer.save_snapshots(folder, step)
            if save and progress.skipped_in_a_row == 0:  # what diverges is not saved
                progress.pause()
                trainer.save(folder, meta, step, best_step(folder))
                saved = step
                if preview and not stop:
                    shown = preview.sample(folder, step, device)
                    progress.track(shown.numbers, step)
                    if shown.sheet is not None:
                        progress.track_preview(shown.sheet, step)
                if accelerator.is_main_process:
                    write_status(folder, meta, f"In training, at step {step} of {last}")
                progress.resume()
            if stop and step < last:
                outcome = f"saved in {folder}: the same command goes on from there"
                if saved < step:
                    outcome = f"not saved, as its gradient was not finite: the same command goes on from step {saved} of {folder}"
                raise KeyboardInterrupt(f"stopped after step {step} of {last}, {outcome}")
    if progress.skipped_in_a_row:
        raise UserError(
            f"the gradient of the last {progress.skipped_in_a_row} step(s) of {folder} was not finite, so that they are "
            "not saved; lower training.lr or set training.clip"
        )


def _any_stops(accelerator: Accelerator, stop: bool, step: int) -> bool:
    """Whether any process was signalled to stop; several exchange it only every LOG_EVERY steps."""
    if accelerator.num_processes == 1:
        return stop
    if step % LOG_EVERY:
        return False
    return accelerator.reduce(torch.tensor(float(stop), device=accelerator.device), "sum").item() > 0


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within it, the first SIGINT or SIGTERM only makes the yielded function return True; a later one acts at once."""
    requested: float | None = None

    def request(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        if requested is None:
            requested = time.monotonic()
        elif time.monotonic() - requested > SAME:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    before = {int(number): signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: requested is not None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
