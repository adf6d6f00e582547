"""The process z_t = alpha(t) z + sigma(t) eps, what a network predicts of it, and its loss.

U-ViT's two diffusions and the straight path of flow matching; the network predicts eps, v, the flow's velocity or the
latent itself, and from each of them follow the others. Times t are float64 tensors on the CPU, 0 < t <= 1: one per
sample (B), or one for all of them (). The network's time embedding gets another number, `time_embedding_input(t)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from nestgen.recipe.recipe import Recipe
from nestgen.recipe.sections import ProcessOptions

STEPS = 1000  # of the discrete process
BETA_MIN, BETA_MAX = 0.1, 20.0  # of the continuous one
GAMMA = 5.0  # of min-SNR weighting
LEAST_SIGMA = 0.05  # in the weight of a predicted latent's error, which would have no bound
LEAST_UNIFORM = 1e-7  # its normal number is 5.2 deviations below the mean


@lru_cache(maxsize=1)
def betas() -> Tensor:
    """The discrete process's variances (1000,), float64: linspace(sqrt(0.00085), sqrt(0.0120))^2."""
    return torch.linspace(math.sqrt(0.00085), math.sqrt(0.0120), STEPS, dtype=torch.float64) ** 2


@lru_cache(maxsize=1)
def _log_alphas() -> Tensor:
    """log alpha at n = 1..1000, float64: alpha_n^2 = prod_{m <= n} (1 - beta_m)."""
    return 0.5 * torch.cumsum(torch.log1p(-betas()), 0)


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Piecewise linear through (xs, ys), xs increasing; the outer pieces go on past the ends."""
    i = torch.searchsorted(xs, x.contiguous()).clamp(1, len(xs) - 1)
    slope = (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1])
    return ys[i - 1] + slope * (x - xs[i - 1])


@dataclass(frozen=True)
class Coefficients:
    """What a network and its loss need of a process at the times of a batch, each (B): computed once, by `Process.at`."""

    t_B: Tensor
    time_embedding_input_B: Tensor
    alpha_B: Tensor
    sigma_B: Tensor
    weight_B: Tensor


@dataclass(frozen=True)
class Process:
    """`discrete`: 1000 steps, log alpha interpolated between them. `vp`: the VP-SDE, beta from 0.1 to 20. `flow`:
    alpha = 1 - t, sigma = t (Lipman et al. 2022, arXiv 2210.02747).

    `prediction` is what the network predicts from z_t, of (z, eps):

        eps        eps
        v          alpha eps - sigma z      (Salimans and Ho 2022, arXiv 2202.00512)
        velocity   eps - z                  (the straight path's dz_t / dt)
        x          z                        (Li and He 2025, arXiv 2511.13720)

    The loss of x is that of the v or velocity that follows from it: an error of z is one of v times 1 / sigma, where
    sigma counts as 0.05 at least.

    `shift` s multiplies sigma / alpha by s at every time: s > 1 gives a large latent, whose neighbours repeat each
    other, more noise (Hoogeboom et al. 2023, arXiv 2301.11093; for `flow` it is t -> s t / (1 + (s - 1) t), Esser et
    al. 2024, arXiv 2403.03206). `weighting` is of the loss over time.

    `logit_normal` (mean, deviation) draws the times of training so that log(sigma / alpha), before the shift, is normal,
    instead of drawing t uniformly: for `flow` t is logit-normal (Esser et al. 2024), for the others the noise levels are
    those of Karras et al. 2022 (arXiv 2206.00364).
    """

    kind: Literal["discrete", "vp", "flow"] = "discrete"
    prediction: Literal["eps", "v", "velocity", "x"] = "eps"
    weighting: Literal["uniform", "min-snr"] = "uniform"
    logit_normal: tuple[float, float] | None = None
    shift: float = 1.0

    @property
    def end_time(self) -> float:
        """The time at which sampling ends: U-ViT's 1/1000, 1e-4 for `vp`, and 0 for `flow`."""
        return {"discrete": 1 / STEPS, "vp": 1e-4, "flow": 0.0}[self.kind]

    def training_time(self, uniform: Tensor) -> Tensor:
        """Training times from uniform numbers in [0, 1): n / 1000 with n in 1..1000, or any t for continuous times."""
        uniform = uniform.double()
        if self.logit_normal is not None:
            mean, deviation = self.logit_normal
            log_noise_to_signal = mean + deviation * torch.special.ndtri(uniform.clamp(min=LEAST_UNIFORM))
            t = self.time_of(-log_noise_to_signal - math.log(self.shift)).clamp(0, 1)
            return (t * STEPS).round().clamp(min=1) / STEPS if self.kind == "discrete" else t
        return (torch.floor(uniform * STEPS) + 1) / STEPS if self.kind == "discrete" else uniform

    def time_embedding_input(self, t: Tensor) -> Tensor:
        """The number whose sinusoids the network gets, float32: n = 1000 t, or 999 t for continuous times."""
        return (t * (STEPS if self.kind == "discrete" else 999)).float()

    def log_alpha(self, t: Tensor) -> Tensor:
        """log alpha(t), float64."""
        unshifted = self._unshifted_log_alpha(t)
        if self.shift == 1:
            return unshifted
        lam = unshifted - torch.log(self._sigma_of(unshifted)) - math.log(self.shift)
        # sigma / alpha = e^-lambda, and alpha + sigma = 1 or alpha^2 + sigma^2 = 1
        power = 1 if self.kind == "flow" else 2
        return -torch.logaddexp(-power * lam, torch.zeros_like(lam)) / power

    def _unshifted_log_alpha(self, t: Tensor) -> Tensor:
        t = t.double()
        if self.kind == "discrete":
            return _interpolate(t * STEPS, torch.arange(1, STEPS + 1, dtype=torch.float64), _log_alphas())
        if self.kind == "flow":
            return torch.log1p(-t)
        return -0.25 * t**2 * (BETA_MAX - BETA_MIN) - 0.5 * t * BETA_MIN

    def _sigma_of(self, log_alpha: Tensor) -> Tensor:
        return -torch.expm1(log_alpha) if self.kind == "flow" else torch.sqrt(-torch.expm1(2 * log_alpha))

    def alpha(self, t: Tensor) -> Tensor:
        """Weight of the signal, float64."""
        return torch.exp(self.log_alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        """Weight of the noise, float64: alpha^2 + sigma^2 = 1, but for `flow` alpha + sigma = 1."""
        return self._sigma_of(self.log_alpha(t))

    def half_log_snr(self, t: Tensor) -> Tensor:
        """lambda(t) = log(alpha / sigma), float64; falls as t grows."""
        return self.log_alpha(t) - torch.log(self.sigma(t))

    def time_of(self, half_log_snr: Tensor) -> Tensor:
        """The t of a lambda: the inverse of `half_log_snr`."""
        lam = half_log_snr.double() + math.log(self.shift)
        if self.kind == "flow":
            return torch.sigmoid(-lam)
        log1p = torch.logaddexp(-2 * lam, torch.zeros((), dtype=torch.float64))
        if self.kind == "discrete":  # log alpha = -log(1 + exp(-2 lambda)) / 2
            n = torch.arange(STEPS, 0, -1, dtype=torch.float64)
            return _interpolate(-0.5 * log1p, _log_alphas().flip(0), n) / STEPS
        # the positive root of (b1 - b0) t^2 / 2 + b0 t = log(1 + exp(-2 lambda))
        c = 2 * (BETA_MAX - BETA_MIN) * log1p
        return c / ((torch.sqrt(BETA_MIN**2 + c) + BETA_MIN) * (BETA_MAX - BETA_MIN))

    def at(self, t: Tensor) -> Coefficients:
        """The coefficients at times t, float32: what follows takes them in place of the times."""
        log_alpha = self.log_alpha(t)
        alpha, sigma = torch.exp(log_alpha), self._sigma_of(log_alpha)
        weight = self._weight(alpha, sigma)
        return Coefficients(t, self.time_embedding_input(t), alpha.float(), sigma.float(), weight.float())

    def add_noise(self, z_BCHW: Tensor, eps_BCHW: Tensor, t: Tensor | Coefficients) -> Tensor:
        """alpha(t) z + sigma(t) eps."""
        alpha, sigma = self._alpha_sigma(t, z_BCHW)
        return alpha * z_BCHW + sigma * eps_BCHW

    def target(self, z_BCHW: Tensor, eps_BCHW: Tensor, t: Tensor | Coefficients) -> Tensor:
        """The network's target (B, C, H, W), by `prediction`."""
        if self.prediction == "eps":
            return eps_BCHW
        if self.prediction == "x":
            return z_BCHW
        if self.prediction == "velocity":
            return eps_BCHW - z_BCHW
        alpha, sigma = self._alpha_sigma(t, z_BCHW)
        return alpha * eps_BCHW - sigma * z_BCHW

    def eps(self, output_BCHW: Tensor, z_t_BCHW: Tensor, t: Tensor | Coefficients) -> Tensor:
        """The noise eps in z_t that follows from a network's output, (B, C, H, W)."""
        if self.prediction == "eps":
            return output_BCHW
        alpha, sigma = self._alpha_sigma(t, output_BCHW)
        if self.prediction == "x":
            return (z_t_BCHW - alpha * output_BCHW) / sigma
        if self.prediction == "velocity":
            return (z_t_BCHW + alpha * output_BCHW) / (alpha + sigma)
        return (sigma * z_t_BCHW + alpha * output_BCHW) / (alpha**2 + sigma**2)

    def latent(self, output_BCHW: Tensor, z_t_BCHW: Tensor, t: Tensor | Coefficients) -> Tensor:
        """The latent z in z_t that follows from a network's output, (B, C, H, W)."""
        if self.prediction == "x":
            return output_BCHW
        alpha, sigma = self._alpha_sigma(t, output_BCHW)
        if self.prediction == "eps":
            return (z_t_BCHW - sigma * output_BCHW) / alpha
        if self.prediction == "velocity":
            return (z_t_BCHW - sigma * output_BCHW) / (alpha + sigma)
        return (alpha * z_t_BCHW - sigma * output_BCHW) / (alpha**2 + sigma**2)

    def weight(self, t: Tensor) -> Tensor:
        """Weight of the prediction's squared error in the loss, float64.

        `min-snr` weighs the error of the latent by min(SNR, 5), SNR = (alpha / sigma)^2 (Hang et al. 2023, arXiv
        2303.09556). The prediction's error is that of the latent times alpha / sigma for eps,
        (alpha^2 + sigma^2) / sigma for v, (alpha + sigma) / sigma for velocity and itself for x.
        """
        return self._weight(self.alpha(t), self.sigma(t))

    def _weight(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        if self.prediction == "x":
            inverse_variance = 1 / sigma.clamp(min=LEAST_SIGMA) ** 2
            return inverse_variance if self.weighting == "uniform" else (alpha**2 * inverse_variance).clamp(max=GAMMA)
        if self.weighting == "uniform":
            return torch.ones_like(alpha)
        latent_weight = torch.minimum(alpha**2, GAMMA * sigma**2)  # times 1 / sigma^2, so that sigma may be 0
        if self.prediction == "eps":
            return latent_weight / alpha**2
        return latent_weight / (alpha**2 + sigma**2 if self.prediction == "v" else alpha + sigma) ** 2

    def loss(self, output_BCHW: Tensor, z_BCHW: Tensor, eps_BCHW: Tensor, t_B: Tensor | Coefficients) -> Tensor:
        """Weighted mean squared error of the prediction, in float32 whatever the precision of the output."""
        error_BCHW = output_BCHW.float() - self.target(z_BCHW.float(), eps_BCHW.float(), t_B)
        weight_B = t_B.weight_B if isinstance(t_B, Coefficients) else self.weight(t_B)
        return (weight_B.to(error_BCHW.device, torch.float32) * error_BCHW.square().mean((1, 2, 3))).mean()

    def _alpha_sigma(self, t: Tensor | Coefficients, z_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t), (B, 1, 1, 1) or (1, 1, 1, 1), on the device and in the precision of a batch."""
        pair = (t.alpha_B, t.sigma_B) if isinstance(t, Coefficients) else (self.alpha(t), self.sigma(t))
        alpha, sigma = (one.to(z_BCHW.device, z_BCHW.dtype).reshape(-1, 1, 1, 1) for one in pair)
        return alpha, sigma


def level_process(recipe: Recipe, level: int) -> Process:
    """The process of a level."""
    return Process(**recipe.process.model_dump(), shift=recipe.levels[level].shift)


def process_from_meta(meta: dict[str, Any]) -> Process:
    """The process that a checkpoint's `meta` records."""
    options = ProcessOptions.model_validate(meta["process"])
    return Process(**options.model_dump(), shift=meta["levels"][meta["level"]]["shift"])
