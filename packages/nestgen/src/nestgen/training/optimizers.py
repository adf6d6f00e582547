"""The optimisers of a denoiser's weights: AdamW, and where the recipe has it Muon for the matrices within the blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from nestgen.errors import UserError
from nestgen.recipe.sections import TrainingOptions
from nestgen.training.fsdp import shard_as

HIDDEN = ("in_blocks.", "mid_block.", "out_blocks.", "sites.")  # where Muon's matrices are


@dataclass(frozen=True)
class Optimizer:
    """One optimiser, the weights that it moves by their names, and its share of the learning rate."""

    optimizer: AcceleratedOptimizer
    weights: Mapping[str, Tensor]
    lr_factor: float

    def step(self, lr: float, finite: Tensor) -> None:
        """Moves the weights by their gradients, which are gone then; where `finite` is false it changes nothing else.

        `finite` stays on the device: AdamW looks at it there, and Muon's step, which cannot, is taken back.
        """
        for group in self.optimizer.param_groups:  # by hand: a prepared scheduler would count processes, not steps
            group["lr"] = lr * self.lr_factor
        if self.optimizer.scaler is not None:  # skips by itself, and then scales less
            self.optimizer.step()
        elif isinstance(self.optimizer.optimizer, torch.optim.AdamW):
            self.optimizer.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        else:
            before = {name: tensor.clone() for name, tensor in self._moving().items()}
            self.optimizer.step()
            for name, tensor in self._moving().items():
                tensor.copy_(tensor.where(finite, before[name] if name in before else torch.zeros_like(tensor)))
        self.optimizer.zero_grad()

    def _moving(self) -> dict[str, Tensor]:
        """All tensors that a step changes in place."""
        return {name: weight.detach() for name, weight in self.weights.items()} | self.state()

    def state(self) -> dict[str, Tensor]:
        """The state of each weight, `<name>.<key>`."""
        states = self.optimizer.state_dict()["state"]
        return {
            f"{name}.{key}": value
            for number, name in enumerate(self.weights)
            for key, value in states.get(number, {}).items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave; weights without any, as where every step was skipped, have none."""
        state: dict[int, dict[str, Tensor]] = {}
        for number, (name, weight) in enumerate(self.weights.items()):
            found = {
                key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.rpartition(".")[0] == name
            }
            if found:
                state[number] = {
                    key: value if key == "step" else shard_as(value, weight) for key, value in found.items()
                }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def make_optimizers(
    accelerator: Accelerator, weights: Mapping[str, Tensor], options: TrainingOptions
) -> tuple[Optimizer, ...]:
    """The optimisers of some weights by name, prepared by Accelerate.

    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) makes each step of a matrix orthogonal by five
    Newton-Schulz iterations; scaled so that its entries are as large as AdamW's (Liu et al. 2025, arXiv 2502.16982), it
    takes learning rates of the same size. Raises UserError for a torch that has no Muon.
    """
    matrices = {
        name: weight
        for name, weight in weights.items()
        if options.muon is not None and weight.ndim == 2 and name.startswith(HIDDEN)
    }
    others = {name: weight for name, weight in weights.items() if name not in matrices}
    adamw = torch.optim.AdamW(
        others.values(), lr=options.lr, betas=options.betas, weight_decay=options.weight_decay, fused=True
    )
    optimizers = [Optimizer(accelerator.prepare(adamw), others, 1.0)]
    if options.muon is not None:
        if not hasattr(torch.optim, "Muon"):
            raise UserError(f"training.muon needs torch 2.9 or later, and this is {torch.__version__}; set muon: null")
        muon = torch.optim.Muon(
            matrices.values(),
            lr=options.muon,
            weight_decay=options.weight_decay,
            momentum=0.95,
            ns_steps=5,
            adjust_lr_fn="match_rms_adamw",
        )
        optimizers.append(Optimizer(accelerator.prepare(muon), matrices, options.muon / options.lr))
    return tuple(optimizers)
