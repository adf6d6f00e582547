"""Seeing a training: the bar, the log, the trackers, and how much of the machine it uses."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from nestgen.errors import UserError
from nestgen.recipe.sections import TrainingOptions
from nestgen.runs import loss_log

SETTLED = 2  # reports after which the rate is that of the training: the first steps allocate and compile
MOST_SKIPPED = 50  # steps in a row; a scaler of fp16 needs some twenty to find its scale

# Dense matrix products in bf16 and fp16, TFLOP/s, by a part of the device's name (the vendors' data sheets).
PEAKS = {"H200": 989.4, "H100": 989.4, "A100": 312.0, "L40S": 362.1, "L4": 121.0, "A10G": 70.0, "RTX 4090": 165.2}


def peak_of(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of a device; None if it is not in the table."""
    if device.type != "cuda" or precision == "no":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in PEAKS.items() if part in name), None)


class Progress:
    """The progress bar and log of steps first + 1 to last. `flops` are those of training on one sample."""

    def __init__(
        self, accelerator: Accelerator, options: TrainingOptions, folder: Path, first: int, last: int, flops: float
    ) -> None:
        self.accelerator, self.options, self.folder, self.flops = accelerator, options, folder, flops
        self.peak = peak_of(accelerator.device, options.precision)
        self.last, self.skipped_in_a_row, self.reports = last, 0, 0
        self._in_a_row = torch.zeros((), device=accelerator.device)
        self.bar = tqdm(
            initial=first,
            total=last,
            unit="step",
            desc=folder.name,
            mininterval=0.2 if sys.stderr.isatty() else 10,
            disable=not accelerator.is_main_process,
        )
        self._begin()

    def _begin(self) -> None:
        self._loss, self._norm, self._counted = torch.zeros(3, device=self.accelerator.device).unbind()
        self._steps, self._started = 0, time.perf_counter()

    def pause(self) -> None:
        """Stops the clock: what follows is not training, up to `resume`."""
        self._paused = time.perf_counter()

    def resume(self) -> None:
        """Starts the clock again."""
        self._started += time.perf_counter() - self._paused

    def add(self, loss: Tensor, gradient_norm: Tensor, finite: Tensor) -> None:
        """Counts a step, and its loss and gradient if they were finite: on the device, for which nothing here waits."""
        self.bar.update()
        self._steps += 1
        self._loss += loss.where(finite, 0)
        self._norm += gradient_norm.where(finite, 0)
        self._counted += finite
        self._in_a_row = (self._in_a_row + 1).where(~finite, 0)

    def report(self, step: int, learning_rate: float) -> None:
        """Shows and logs the mean since the last report; every process calls it.

        Raises UserError after too many skipped steps in a row.
        """
        loss, norm, counted, self.skipped_in_a_row = self._read()
        skipped = self._steps - counted
        seconds = time.perf_counter() - self._started
        rate = self._steps * self.options.batch / seconds
        record: dict[str, Any] = {"step": step, "loss": loss, "lr": learning_rate, "gradient_norm": norm}
        record["memory_gib"] = round(memory_used(self.accelerator.device) / 2**30, 2)
        record["samples_per_second"] = round(rate, 1)
        flops = rate * self.flops
        if self.peak is None:
            record["gflop_per_second"] = round(flops / 1e9, 1)
            speed = f"{flops / 1e9:.0f} GFLOP/s"
        else:
            record["utilisation"] = round(flops / self.peak / self.accelerator.num_processes, 4)
            speed = f"{record['utilisation']:.1%} of the peak"
        if skipped:
            record["skipped"] = skipped
        if self.accelerator.is_main_process:
            loss_log.append(self.folder / "log.jsonl", record)
        self.track({key: value for key, value in record.items() if key != "step" and value is not None}, step)
        shown = "no finite step" if loss is None else f"loss {loss:.4f}"
        self.bar.set_postfix_str(f"{shown}, {rate:.0f} samples/s, {speed}", refresh=False)
        self.reports += 1
        if self.reports == SETTLED and self.accelerator.is_main_process:
            self.bar.write(time_left(self.last - step, self.options.batch / rate))
        if self.skipped_in_a_row >= MOST_SKIPPED:
            raise UserError(
                f"the gradient was not finite for {MOST_SKIPPED} steps in a row, up to step {step} of {self.folder}, and "
                "none of them is saved; lower training.lr or set training.clip or another training.precision"
            )
        self._begin()

    def _read(self) -> tuple[float | None, float | None, int, int]:
        """Mean loss and gradient norm of the finite steps, how many they are, and how many were skipped in a row up to now."""
        loss: Tensor = self.accelerator.reduce(self._loss, "mean")
        total, norm, counted, in_a_row = torch.stack([loss, self._norm, self._counted, self._in_a_row]).tolist()
        means = (one / counted if counted else math.nan for one in (total, norm))
        mean_loss, mean_norm = (one if math.isfinite(one) else None for one in means)
        return mean_loss, mean_norm, int(counted), int(in_a_row)

    def track(self, values: dict[str, Any], step: int) -> None:
        """Sends numbers to the trackers."""
        self.accelerator.log(values, step=step)

    def track_preview(self, sheet: Image.Image, step: int) -> None:
        """Sends an image to the trackers; only the main process has any."""
        for tracker in self.accelerator.trackers:
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"preview": np.asarray(sheet)[None]}, step=step, **options)


def memory_used(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU so far, or what this process has of the machine's memory."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def time_left(steps: int, seconds: float) -> str:
    """A sentence on how long so many steps take, of `seconds` each."""
    minutes = steps * seconds / 60
    time_needed = f"{minutes:.0f} minutes" if minutes >= 2 else "less than two minutes"
    time_needed = f"{minutes / 60:.1f} hours" if minutes >= 90 else time_needed
    return f"At this rate the {steps:,} steps that are left take {time_needed}; training.steps says how many there are."
