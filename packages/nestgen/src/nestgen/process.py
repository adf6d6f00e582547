"""The diffusion process z_t = alpha(t) z + sigma(t) eps, in U-ViT's two forms.

Times t are float64 tensors on the CPU, 0 < t <= 1. The network is told another number, `told(t)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

STEPS = 1000  # of the discrete process
BETA_MIN, BETA_MAX = 0.1, 20.0  # of the continuous one


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
class Process:
    """`discrete`: 1000 steps, log alpha interpolated between them. `vp`: the VP-SDE, beta from 0.1 to 20."""

    kind: Literal["discrete", "vp"]

    @property
    def first(self) -> float:
        """The time at which sampling ends: U-ViT's 1/1000, and 1e-4 for `vp`."""
        return 1 / STEPS if self.kind == "discrete" else 1e-4

    def time(self, uniform: Tensor) -> Tensor:
        """Training times from uniform numbers in [0, 1): n / 1000 with n in 1..1000, or t itself for `vp`."""
        uniform = uniform.double()
        return (torch.floor(uniform * STEPS) + 1) / STEPS if self.kind == "discrete" else uniform

    def told(self, t: Tensor) -> Tensor:
        """What the network is told, float32: n = 1000 t, or 999 t for `vp`."""
        return (t * (STEPS if self.kind == "discrete" else 999)).float()

    def log_alpha(self, t: Tensor) -> Tensor:
        """log alpha(t), float64."""
        t = t.double()
        if self.kind == "discrete":
            return _interpolate(t * STEPS, torch.arange(1, STEPS + 1, dtype=torch.float64), _log_alphas())
        return -0.25 * t**2 * (BETA_MAX - BETA_MIN) - 0.5 * t * BETA_MIN

    def alpha(self, t: Tensor) -> Tensor:
        """Weight of the signal, float64."""
        return torch.exp(self.log_alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        """Weight of the noise, float64: alpha^2 + sigma^2 = 1."""
        return torch.sqrt(-torch.expm1(2 * self.log_alpha(t)))

    def half_log_snr(self, t: Tensor) -> Tensor:
        """lambda(t) = log(alpha / sigma), float64; falls as t grows."""
        return self.log_alpha(t) - torch.log(self.sigma(t))

    def time_of(self, half_log_snr: Tensor) -> Tensor:
        """The t of a lambda: the inverse of `half_log_snr`."""
        log1p = torch.logaddexp(-2 * half_log_snr.double(), torch.zeros((), dtype=torch.float64))
        if self.kind == "discrete":  # log alpha = -log(1 + exp(-2 lambda)) / 2
            n = torch.arange(STEPS, 0, -1, dtype=torch.float64)
            return _interpolate(-0.5 * log1p, _log_alphas().flip(0), n) / STEPS
        # the positive root of (b1 - b0) t^2 / 2 + b0 t = log(1 + exp(-2 lambda))
        c = 2 * (BETA_MAX - BETA_MIN) * log1p
        return c / ((torch.sqrt(BETA_MIN**2 + c) + BETA_MIN) * (BETA_MAX - BETA_MIN))

    def add_noise(self, z_BCHW: Tensor, eps_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """alpha(t) z + sigma(t) eps, with one time per sample."""
        alpha_B111, sigma_B111 = (
            weight(t_B).to(z_BCHW.dtype)[:, None, None, None].to(z_BCHW.device) for weight in (self.alpha, self.sigma)
        )
        return alpha_B111 * z_BCHW + sigma_B111 * eps_BCHW


def loss(eps_hat_BCHW: Tensor, eps_BCHW: Tensor) -> Tensor:
    """Mean squared error on eps, in float32 whatever the precision of the prediction."""
    return (eps_hat_BCHW.float() - eps_BCHW.float()).square().mean()
