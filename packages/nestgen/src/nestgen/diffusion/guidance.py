"""A denoiser with guidance, for one batch: what does not change from step to step is computed once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nestgen.denoiser.uvit import Denoiser, Outputs
from nestgen.diffusion.process import Process
from nestgen.recipe.level_sampling import LevelSampling
from nestgen.recipe.sections import Interval


@dataclass(frozen=True)
class GuidedDenoiser:
    """The latent that a denoiser predicts for one batch, with guidance: a `Denoise` of diffusion/solvers.py.

    With d the denoiser's output, s the guidance, w the autoguidance and v the internal guidance of `settings`, the guided
    output is

        d(conditional) + s (d(conditional) - d(unconditional)) + w (d(conditional) - weak(conditional))
            + (v - 1) (d(conditional) - side(conditional)).

    The second term is classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598), whose two outputs are computed
    in one batch; the third is autoguidance (Karras et al. 2024, arXiv 2406.02507); the last is internal guidance (arXiv
    2512.24176), by the denoiser's own side head in the same call: alone it makes side + v (d - side). As the weights sum
    to 1, it does not matter whether the networks predict noise, velocity or the latent. Networks in half precision get their
    inputs so; all else is in the latents' own.

    `conditions` are the noised latents (B, C, H, W) of the levels above, the nearest first. All tensors are on the
    denoiser's device.
    """

    denoiser: Denoiser
    process: Process
    settings: LevelSampling
    conditions: tuple[Tensor, ...] = ()
    label_B: Tensor | None = None
    context_BTD: Tensor | None = None
    weak: Denoiser | None = None

    def __call__(self, z_BCHW: Tensor, t: Tensor) -> Tensor:
        """The predicted latent (B, C, H, W) at one time, a float64 scalar on the CPU."""
        s, w, v = self._strengths(float(t))
        latent_BCHW, z_BCHW = z_BCHW, z_BCHW.to(self.denoiser.pos_embed.dtype)
        time_B = self.process.time_embedding_input(t).to(z_BCHW.device).expand(len(z_BCHW))
        if s:
            outputs = self._outputs(z_BCHW.repeat(2, 1, 1, 1), time_B.repeat(2), self._with_unconditional)
            conditional_BCHW, unconditional_BCHW = outputs.prediction_BCHW.chunk(2)
            out_BCHW = conditional_BCHW + s * (conditional_BCHW - unconditional_BCHW)
        else:
            outputs = self._outputs(z_BCHW, time_B, self._conditional)
            out_BCHW = conditional_BCHW = outputs.prediction_BCHW
        if w and self.weak is not None:
            out_BCHW = out_BCHW + w * (conditional_BCHW - self.weak(z_BCHW, time_B, **self._conditional))
        if v != 1 and outputs.side_BCHW is not None:
            out_BCHW = out_BCHW + (v - 1) * (conditional_BCHW - outputs.side_BCHW[: len(z_BCHW)])
        return self.process.latent(out_BCHW.to(latent_BCHW.dtype), latent_BCHW, t)

    def _outputs(self, z_BCHW: Tensor, time_B: Tensor, inputs: dict[str, Any]) -> Outputs:
        outputs: Outputs = self.denoiser(z_BCHW, time_B, **inputs, all_outputs=True)
        return outputs

    def _strengths(self, t: float) -> tuple[float, float, float]:
        """Guidance, autoguidance and internal guidance at a time."""
        s, w, v = 0.0, 0.0, 1.0
        if _within(self.settings.interval, t):
            s, w = self.settings.guidance or 0.0, self.settings.autoguidance
        internal = self.settings.internal_guidance
        if internal is not None and _within(internal.interval, t):
            v = internal.scale
        return s, w, v

    @cached_property
    def _sigma_BK(self) -> Tensor | None:
        """The noise on each condition, the same for all images."""
        if not self.conditions:
            return None
        batch, device = len(self.conditions[0]), self.conditions[0].device
        return torch.tensor(self.settings.sigmas, device=device).expand(batch, -1)

    @cached_property
    def _conditional(self) -> dict[str, Any]:
        """The denoiser's arguments beside z and the time."""
        return {
            "condition": self.conditions or None,
            "label_B": self.label_B,
            "context_BTD": self.context_BTD,
            "sigma_BK": self._sigma_BK,
        }

    @cached_property
    def _with_unconditional(self) -> dict[str, Any]:
        """The arguments twice, the second time without conditions, class and caption."""
        twice: dict[str, Any] = {"condition": tuple(torch.cat([one, one]) for one in self.conditions) or None}
        twice["sigma_BK"] = None if self._sigma_BK is None else self._sigma_BK.repeat(2, 1)
        twice["label_B"] = twice["context_BTD"] = None
        if self.label_B is not None:
            null_B = torch.full_like(self.label_B, self.denoiser.config.labels)
            twice["label_B"] = torch.cat([self.label_B, null_B])
        if self.context_BTD is not None:
            null_BTD = self.denoiser.null_context.expand_as(self.context_BTD)
            twice["context_BTD"] = torch.cat([self.context_BTD, null_BTD.to(self.context_BTD)])
        if self.conditions:
            batch, device = len(self.conditions[0]), self.conditions[0].device
            twice["keep_B"] = torch.arange(2 * batch, device=device) < batch
        return twice


def _within(interval: Interval | None, t: float) -> bool:
    return interval is None or interval.low <= t <= interval.high
