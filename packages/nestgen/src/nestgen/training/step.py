"""The state of a training and what one optimiser step does to it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from nestgen.denoiser.uvit import Denoiser
from nestgen.diffusion.process import Process
from nestgen.recipe.sections import TrainingOptions
from nestgen.runs import ema
from nestgen.runs.checkpoint import Checkpoint, save_checkpoint
from nestgen.runs.ema_snapshots import save_snapshot
from nestgen.training.batches import Batch
from nestgen.training.fsdp import full_tensor, shard, shard_as


def learning_rate(options: TrainingOptions, step: int) -> float:
    """Learning rate of the optimiser step that follows `step` steps: linear warm-up, then constant."""
    return options.lr * min(1.0, (step + 1) / max(1, options.warmup))


@dataclass(frozen=True)
class StepResult:
    """What one step did."""

    loss: Tensor  # before the step, of this process's share of the batch
    skipped: bool  # by all processes, because the gradient was not finite


class Trainer:
    """A denoiser, the averages of its weights and its optimiser, on the accelerator's device.

    `denoiser` has its first weights; those of `checkpoint` replace them if there is one. `micro_batch` is the most samples in
    one forward pass.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        denoiser: Denoiser,
        process: Process,
        options: TrainingOptions,
        checkpoint: Checkpoint | None = None,
        micro_batch: int | None = None,
    ) -> None:
        self.accelerator, self.denoiser, self.process, self.options = accelerator, denoiser, process, options
        self.micro_batch = micro_batch
        self.denoiser.checkpointing = options.checkpoint_activations
        self.denoiser.to(accelerator.device)
        self.sharded = options.shard and accelerator.num_processes > 1
        if self.sharded:
            shard(self.denoiser)
        if self.options.compile:
            self.denoiser.compile()  # in place: the weights keep their names
        self.weights: dict[str, Tensor] = dict(self.denoiser.named_parameters())
        lengths = ema.LENGTHS if self.options.ema_snapshots else ()
        self.average = self._copy()
        self.power = {length: self._copy() for length in lengths}
        optimizer = torch.optim.AdamW(
            self.weights.values(),
            lr=self.options.lr,
            betas=self.options.betas,
            weight_decay=self.options.weight_decay,
            fused=True,
        )
        # The learning rate is set by hand: a prepared scheduler would count processes, not steps.
        self.optimizer = accelerator.prepare(optimizer)
        self.model = self.denoiser if self.sharded else accelerator.prepare(self.denoiser)
        if checkpoint:
            self._load(checkpoint)

    def step(self, batch: Batch, step: int) -> StepResult:
        """The optimiser step that follows `step` steps. A step whose gradient is not finite changes nothing."""
        batch = batch.to(self.accelerator.device)
        parts = batch.parts(self.micro_batch)
        shares = [len(part.z_BCHW) / len(batch.z_BCHW) for part in parts]
        losses = [self._backward(part, share, part is parts[-1]) for part, share in zip(parts, shares)]
        # Gradients are sums over processes by now: all of them get the same norm.
        self.accelerator.unscale_gradients(self.optimizer)
        gradients = [weight.grad for weight in self.weights.values() if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        finite = bool(full_tensor(norm).isfinite())
        if self.options.clip is not None and finite:
            torch.nn.utils.clip_grads_with_norm_(self.weights.values(), self.options.clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.options, step)
        if finite or self.accelerator.scaler:  # a scaler skips by itself, and then scales less
            self.optimizer.step()
        self.optimizer.zero_grad()
        if finite:
            self._update_averages(step)
        return StepResult(torch.stack(losses).sum(), not finite)

    def _backward(self, batch: Batch, share: float, last: bool) -> Tensor:
        """Adds the gradients of a share of the batch; only with the last do the processes exchange them."""
        z_t_BCHW = self.process.add_noise(batch.z_BCHW, batch.eps_BCHW, batch.t_B)
        time_B = self.process.time_embedding_input(batch.t_B).to(z_t_BCHW.device)
        if self.sharded:
            self.denoiser.set_requires_gradient_sync(last)  # type: ignore[operator]
        alone = not last and not self.sharded
        with self.accelerator.no_sync(self.model) if alone else contextlib.nullcontext():
            with self.accelerator.autocast():
                output_BCHW = self.model(z_t_BCHW, time_B, **batch.denoiser_inputs())
            value = self.process.loss(output_BCHW, batch.z_BCHW, batch.eps_BCHW, batch.t_B)
            self.accelerator.backward(value * share)
        return value.detach() * share

    @torch.no_grad()
    def _update_averages(self, step: int) -> None:
        """Moves the averages towards the weights."""
        weights = list(self.weights.values())
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - ema.decay(self.options.ema, step))
        for length, average in self.power.items():
            torch._foreach_lerp_(list(average.values()), weights, 1 - ema.power_decay(length, step))

    def _copy(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self.weights.items()}

    def save(self, folder: Path, meta: dict[str, Any], step: int, best: int | None) -> None:
        """Writes the checkpoint of a step: the main process does, the others wait for it. That of `best` stays."""
        buffers = dict(self.denoiser.named_buffers())
        state = self.optimizer.state_dict()["state"]
        optimizer = {
            f"{name}.{key}": value
            for number, name in enumerate(self.weights)
            for key, value in state.get(number, {}).items()
        }
        parts = {"denoiser": self.weights | buffers, "ema": self.average | buffers, "optimizer": optimizer}
        for length, average in self.power.items():
            parts[f"power-{length:g}"] = average
        gathered = {part: self.gather(tensors) for part, tensors in parts.items()}
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            meta = {**meta, "step": step, "scaler": scaler.state_dict() if scaler else None}
            save_checkpoint(folder, gathered, meta, self.options.keep, best)
        self.accelerator.wait_for_everyone()

    def save_snapshots(self, folder: Path, step: int) -> None:
        """Writes the power-function averages of a step (runs/ema_snapshots.py)."""
        for length, average in self.power.items():
            tensors = self.gather(average | dict(self.denoiser.named_buffers()))
            if self.accelerator.is_main_process:
                save_snapshot(folder, step, length, tensors)

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Full tensors on the main process's CPU; nothing on the others, which contribute their shards."""
        gathered = {}
        for name, value in tensors.items():
            tensor = full_tensor(value.detach())
            if self.accelerator.is_main_process:
                gathered[name] = tensor.cpu()
        return gathered

    @torch.no_grad()
    def _load(self, checkpoint: Checkpoint) -> None:
        targets = {"denoiser": self.weights, "ema": self.average}
        targets |= {f"power-{length:g}": average for length, average in self.power.items()}
        for part, target in targets.items():
            tensors = checkpoint.load(part)
            for name, value in target.items():
                value.copy_(shard_as(tensors[name], value))
        tensors = checkpoint.load("optimizer")
        state: dict[int, dict[str, Tensor]] = {
            number: {
                key: tensors[f"{name}.{key}"] if key == "step" else shard_as(tensors[f"{name}.{key}"], weight)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
            for number, (name, weight) in enumerate(self.weights.items())
            if f"{name}.step" in tensors  # none where every step so far was skipped
        }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if self.accelerator.scaler and checkpoint.meta["scaler"]:
            self.accelerator.scaler.load_state_dict(checkpoint.meta["scaler"])
