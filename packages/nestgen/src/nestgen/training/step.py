"""The state of a training and what one optimiser step does to it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from nestgen.compiler import compile_in_place, missing_compiler
from nestgen.denoiser.half_weights import HalfWeights
from nestgen.denoiser.uvit import Denoiser, Outputs
from nestgen.diffusion.linear_part import with_linear_part
from nestgen.diffusion.process import Process
from nestgen.recipe.sections import TrainingOptions
from nestgen.runs import ema
from nestgen.runs.checkpoint import Checkpoint, save_checkpoint
from nestgen.runs.ema_snapshots import save_snapshot
from nestgen.training.batches import Batch
from nestgen.training.fsdp import full_tensor, shard, shard_as
from nestgen.training.optimizers import make_optimizers

GRAPHED = (
    64  # tokens at most of a denoiser whose step a GPU takes as one CUDA graph: it would wait for launches otherwise
)


def learning_rate(options: TrainingOptions, step: int) -> float:
    """Learning rate of the optimiser step that follows `step` steps: linear warm-up, times the share left by decay."""
    return options.lr * min(1.0, (step + 1) / max(1, options.warmup)) * _decayed_share(options, step)


def _decayed_share(options: TrainingOptions, step: int) -> float:
    done = step / options.steps
    match options.lr_decay:
        case "linear":
            return min(1.0, 2 * (1 - done))
        case "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        case "inverse-sqrt":
            return math.sqrt(max(1, options.warmup) / max(1, options.warmup, step))
    return 1.0


@dataclass(frozen=True)
class StepResult:
    """What one step did."""

    loss: Tensor  # before the step, of this process's share of the batch
    gradient_norm: Tensor  # of all weights, before clipping
    finite: Tensor  # bool: whether that is finite; if not, all processes skip the step


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
        on_gpu = accelerator.device.type == "cuda"
        compiled = options.compile or (options.compile is None and on_gpu and not missing_compiler(accelerator.device))
        if compiled:
            few = on_gpu and math.prod(denoiser.config.grid) <= GRAPHED and accelerator.num_processes == 1
            # A second part of the batch would run in the memory of the first one's graph, where the gradients are.
            whole = micro_batch is None or micro_batch >= options.batch
            compile_in_place(self.denoiser, "reduce-overhead" if few and whole else None)
        self.weights: dict[str, Tensor] = dict(self.denoiser.named_parameters())
        lengths = ema.LENGTHS if self.options.ema_snapshots else ()
        self.average = self._copy()
        self.power = {length: self._copy() for length in lengths}
        self.optimizers = make_optimizers(accelerator, self.weights, options)
        # Fewer launches are nothing to a CPU, and a compiler and FSDP cast in their own ways.
        casts = options.precision != "no" and not compiled and accelerator.device.type != "cpu"
        self.model = self.denoiser
        if not self.sharded:
            self.model = accelerator.prepare(HalfWeights(self.denoiser) if casts else self.denoiser)
        if checkpoint:
            self._load(checkpoint)

    def step(self, batch: Batch, step: int) -> StepResult:
        """The optimiser step that follows `step` steps. A step whose gradient is not finite changes nothing.

        Nothing here waits for the device: what is not finite is skipped there.
        """
        batch = batch.to(self.accelerator.device)
        parts = batch.parts(self.micro_batch)
        shares = [len(part.z_BCHW) / len(batch.z_BCHW) for part in parts]
        losses = [self._backward(part, share, step, part is parts[-1]) for part, share in zip(parts, shares)]
        # Gradients are sums over processes by now: all of them get the same norm.
        self.accelerator.unscale_gradients([one.optimizer for one in self.optimizers])
        gradients = [weight.grad for weight in self.weights.values() if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.options.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.weights.values(), self.options.clip, norm)
        norm = full_tensor(norm)
        finite = norm.isfinite()
        for one in self.optimizers:
            one.step(learning_rate(self.options, step), finite)
        self._update_averages(step, finite)
        return StepResult(torch.stack(losses).sum(), norm, finite)

    def _backward(self, batch: Batch, share: float, step: int, last: bool) -> Tensor:
        """Adds the gradients of a share of the batch; only with the last do the processes exchange them.

        Returns that share of the prediction's loss alone, which is comparable between runs.
        """
        z_t_BCHW = self.process.add_noise(batch.z_BCHW, batch.eps_BCHW, batch.at)
        if self.sharded:
            self.denoiser.set_requires_gradient_sync(last)  # type: ignore[operator]
        alone = not last and not self.sharded
        with self.accelerator.no_sync(self.model) if alone else contextlib.nullcontext():
            with self.accelerator.autocast():
                outputs: Outputs = self.model(
                    z_t_BCHW, batch.at.time_embedding_input_B, **batch.denoiser_inputs(), all_outputs=True
                )
            if self.denoiser.config.gaussian:
                given = self.denoiser.gaussian.given(batch.conditions or None, batch.keep_B)
                outputs = with_linear_part(outputs, self.denoiser, self.process, z_t_BCHW, batch.at, given)
            value = self.process.loss(outputs.prediction_BCHW, batch.z_BCHW, batch.eps_BCHW, batch.at)
            self.accelerator.backward((value + self._further_losses(outputs, batch, step)) * share)
        return value.detach() * share

    def _further_losses(self, outputs: Outputs, batch: Batch, step: int) -> Tensor | float:
        """The weighted losses of the side head and of the alignment, where the recipe has them."""
        total: Tensor | float = 0.0
        if outputs.side_BCHW is not None and self.options.side_loss is not None:
            side = self.process.loss(outputs.side_BCHW, batch.z_BCHW, batch.eps_BCHW, batch.at)
            total = total + self.options.side_loss * side
        if outputs.features_BChw is not None and batch.features_BChw is not None and self.options.align is not None:
            # 0 in the end, rather than left out: with several processes every weight needs a gradient
            weight = self.options.align.weight * (step < self.options.align.until * self.options.steps)
            cosine_Bhw = torch.cosine_similarity(outputs.features_BChw.float(), batch.features_BChw, 1)
            total = total + weight * (1 - cosine_Bhw).mean()
        return total

    @torch.no_grad()
    def _update_averages(self, step: int, finite: Tensor) -> None:
        """Moves the averages towards the weights, by nothing after a step that was skipped."""
        constant = self.options.ema_schedule == "constant"
        decays = [(self.average, self.options.ema if constant else ema.decay(self.options.ema, step))]
        decays += [(average, ema.power_decay(length, step)) for length, average in self.power.items()]
        for average, decay in decays:
            averaged = list(average.values())
            moves = torch._foreach_sub(list(self.weights.values()), averaged)
            torch._foreach_mul_(moves, (1 - decay) * finite)
            torch._foreach_add_(averaged, moves)

    def _copy(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self.weights.items()}

    def save(self, folder: Path, meta: dict[str, Any], step: int, best: int | None) -> None:
        """Writes the checkpoint of a step: the main process does, the others wait for it. That of `best` stays."""
        buffers = dict(self.denoiser.named_buffers())
        optimizer = {name: value for one in self.optimizers for name, value in one.state().items()}
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
        for one in self.optimizers:
            one.load(checkpoint.load("optimizer"))
        if self.accelerator.scaler and checkpoint.meta["scaler"]:
            self.accelerator.scaler.load_state_dict(checkpoint.meta["scaler"])
