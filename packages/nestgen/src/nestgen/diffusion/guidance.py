"""A denoiser with guidance, for one batch: what does not change from step to step is computed once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from nestgen.denoiser.uvit import Conditioning, Denoiser, Outputs
from nestgen.diffusion.linear_part import with_linear_part
from nestgen.diffusion.process import Coefficients, Process
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
    to 1, it does not matter whether the networks predict noise, velocity or the latent.

    With `autocast` the networks compute in bfloat16, but for their last layers; networks whose weights are in half precision
    get their inputs so. All else is in the latents' own precision.

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
    autocast: bool = False

    def __call__(self, z_BCHW: Tensor, t: Tensor) -> Tensor:
        """The predicted latent (B, C, H, W) at one time, a float64 scalar on the CPU."""
        s, w, v = self._strengths(float(t))
        latent_BCHW, z_BCHW = z_BCHW, z_BCHW.to(self.denoiser.pos_embed.dtype)
        at = _coefficients(self.process, float(t), z_BCHW.device)
        with torch.autocast(z_BCHW.device.type, torch.bfloat16, enabled=self.autocast):
            if s:
                outputs = self._outputs(self.denoiser, z_BCHW.repeat(2, 1, 1, 1), at, self._with_unconditional)
                conditional_BCHW, unconditional_BCHW = outputs.prediction_BCHW.chunk(2)
                out_BCHW = conditional_BCHW + s * (conditional_BCHW - unconditional_BCHW)
            else:
                outputs = self._outputs(self.denoiser, z_BCHW, at, self._conditional)
                out_BCHW = conditional_BCHW = outputs.prediction_BCHW
            if w:
                assert self.weak is not None
                weak = self._outputs(self.weak, z_BCHW, at, self._weak_conditional)
                out_BCHW = out_BCHW + w * (conditional_BCHW - weak.prediction_BCHW)
            if v != 1:
                assert outputs.side_BCHW is not None
                out_BCHW = out_BCHW + (v - 1) * (conditional_BCHW - outputs.side_BCHW[: len(z_BCHW)])
        return self.process.latent(out_BCHW.to(latent_BCHW.dtype), latent_BCHW, at)

    def _outputs(self, denoiser: Denoiser, z_BCHW: Tensor, at: Coefficients, conditioning: Conditioning) -> Outputs:
        time_B = at.time_embedding_input_B.expand(len(z_BCHW))
        outputs: Outputs = denoiser(z_BCHW, time_B, conditioning=conditioning, all_outputs=True)
        given = conditioning.given if denoiser.config.gaussian else None
        return with_linear_part(outputs, denoiser, self.process, z_BCHW, at, given)

    def _strengths(self, t: float) -> tuple[float, float, float]:
        """Guidance, autoguidance and internal guidance at a time."""
        s, w, v = 0.0, 0.0, 1.0
        if _within(self.settings.interval, t):
            s, w = self.settings.guidance or 0.0, self.settings.autoguidance
        if not self._images:  # both outputs would be the same
            s = 0.0
        internal = self.settings.internal_guidance
        if internal is not None and _within(internal.interval, t):
            v = internal.scale
        return s, w, v

    @cached_property
    def _conditional(self) -> Conditioning:
        return self._prepared(self.denoiser)

    @cached_property
    def _weak_conditional(self) -> Conditioning:
        assert self.weak is not None
        return self._prepared(self.weak)

    def _prepared(self, denoiser: Denoiser) -> Conditioning:
        """What a denoiser makes of the conditions, class and caption."""
        sigma_BK = self._sigma_BK(self._batch)
        return denoiser.prepare(self._batch, self.conditions or None, None, self.label_B, self.context_BTD, sigma_BK)

    @cached_property
    def _with_unconditional(self) -> Conditioning:
        """The same twice, the second time without conditions, class and caption."""
        condition, keep_B, label_B, context_BTD = None, None, None, None
        if self.conditions:
            condition = tuple(torch.cat([one, one]) for one in self.conditions)
            keep_B = torch.arange(2 * self._batch, device=condition[0].device) < self._batch
        if self.label_B is not None:
            label_B = torch.cat([self.label_B, torch.full_like(self.label_B, self.denoiser.config.labels)])
        if self.context_BTD is not None:
            null_BTD = self.denoiser.null_context.expand_as(self.context_BTD)
            context_BTD = torch.cat([self.context_BTD, null_BTD.to(self.context_BTD)])
        batch = 2 * self._batch
        return self.denoiser.prepare(batch, condition, keep_B, label_B, context_BTD, self._sigma_BK(batch))

    @cached_property
    def _images(self) -> int | None:
        """How many the conditions, classes or captions are for; None where there are none of them."""
        return next((len(one) for one in (*self.conditions, self.label_B, self.context_BTD) if one is not None), None)

    @property
    def _batch(self) -> int:
        """Images; 1 where nothing tells them apart."""
        return self._images or 1

    def _sigma_BK(self, batch: int) -> Tensor | None:
        """The noise on each condition, the same for all images."""
        if not self.conditions:
            return None
        return torch.tensor(self.settings.sigmas, device=self.conditions[0].device).expand(batch, -1)


@lru_cache(maxsize=4096)
def _coefficients(process: Process, t: float, device: torch.device) -> Coefficients:
    """The process at one time, on a device: all batches of a sampling are at the same times."""
    at = process.at(torch.tensor(t, dtype=torch.float64))
    return Coefficients(*(getattr(at, one.name).to(device) for one in fields(at)))


def _within(interval: Interval | None, t: float) -> bool:
    return interval is None or interval.low <= t <= interval.high
