"""The best linear prediction of a level, in closed form from the mean and the covariance of its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

MOST_VALUES = 2048  # of a level and those above it: the matrices have their square
LEAST_VARIANCE = 1e-6  # of a direction, against rounding


class Given(NamedTuple):
    """What the levels above say of a batch."""

    mean_BD: Tensor  # of the latents; B is 1 where nothing tells them apart
    keep_B: Tensor | None  # false where the levels above are dropped


class Gaussian(nn.Module):
    """A level's rows as a Gaussian N(m, C), and as another one given the noised levels above.

    Of z_t = alpha z + sigma eps, the means of z and eps are, along the eigenvectors of C with the eigenvalues w,

        E[z | z_t]   = m + alpha w / (alpha^2 w + sigma^2) (z_t - alpha m)
        E[eps | z_t] =        sigma / (alpha^2 w + sigma^2) (z_t - alpha m),

    and nothing linear in z_t has a smaller squared error, whatever the rows' distribution (the Wiener filter; Wang and
    Vastola 2024, arXiv 2412.09726, find trained denoisers close to it at high noise). Given the levels above, c = z' + s n,
    m is m + K (c - m'), where K = C_zz' (C_z'z' + s^2)^-1, and C is C - K C_z'z.

    Until `fit`, the rows are standard normal.
    """

    mean_D: Tensor
    variance_D: Tensor
    basis_DD: Tensor
    given_variance_D: Tensor
    given_basis_DD: Tensor
    gain_DK: Tensor
    above_K: Tensor

    def __init__(self, shape: tuple[int, int, int], condition_shapes: Sequence[tuple[int, int, int]]) -> None:
        super().__init__()
        d, k = math.prod(shape), sum(math.prod(one) for one in condition_shapes)
        buffers = {"mean_D": torch.zeros(d), "variance_D": torch.ones(d), "basis_DD": torch.eye(d)}
        if k:
            buffers |= {"given_variance_D": torch.ones(d), "given_basis_DD": torch.eye(d)}
            buffers |= {"gain_DK": torch.zeros(d, k), "above_K": torch.zeros(k)}
        self.conditional = bool(k)
        for name, value in buffers.items():
            self.register_buffer(name, value)

    @torch.no_grad()
    def fit(self, mean_J: Tensor, covariance_JJ: Tensor, noise_K: Tensor) -> None:
        """Takes the mean and covariance, float64, of a level's values followed by those above it, and the s of the latter."""
        d = len(self.mean_D)
        fitted = {"mean": mean_J[:d], **_directions("", covariance_JJ[:d, :d])}
        if self.conditional:
            across_DK, above_KK = covariance_JJ[:d, d:], covariance_JJ[d:, d:] + torch.diag(noise_K.double() ** 2)
            gain_DK = across_DK @ torch.linalg.pinv(above_KK, hermitian=True)
            fitted |= {"gain": gain_DK, "above": mean_J[d:]}
            fitted |= _directions("given_", covariance_JJ[:d, :d] - gain_DK @ across_DK.T)
        for name, buffer in self.named_buffers():
            buffer.copy_(fitted[name.rpartition("_")[0]])

    def given(self, conditions: Sequence[Tensor] | Tensor | None, keep_B: Tensor | None) -> Given:
        """What noised latents (B, C, H, W) of the levels above, the nearest first, say; None is nothing."""
        mean_D = self.mean_D.float()
        if conditions is None or not self.conditional:
            return Given(mean_D[None], mean_D.new_zeros(1, dtype=torch.bool) if self.conditional else None)
        several = [conditions] if isinstance(conditions, Tensor) else conditions
        with _full_precision(mean_D):
            above_BK = torch.cat([one_BCHW.float().flatten(1) for one_BCHW in several], 1) - self.above_K
            mean_BD = mean_D + above_BK @ self.gain_DK.float().T
        return Given(mean_BD if keep_B is None else torch.where(keep_B[:, None], mean_BD, mean_D), keep_B)

    def forward(self, z_t_BCHW: Tensor, alpha_B: Tensor, sigma_B: Tensor, given: Given) -> tuple[Tensor, Tensor]:
        """The means of z and eps, float32 (B, C, H, W)."""
        alpha_B1, sigma_B1 = (one.to(z_t_BCHW.device).float().reshape(-1, 1) for one in (alpha_B, sigma_B))
        rest_BD = z_t_BCHW.float().flatten(1) - alpha_B1 * given.mean_BD

        def means(variance_D: Tensor, basis_DD: Tensor) -> Tensor:
            variance_D, basis_DD = variance_D.float(), basis_DD.float()
            share_BD = rest_BD @ basis_DD / (alpha_B1**2 * variance_D + sigma_B1**2)
            return torch.stack([alpha_B1 * variance_D * share_BD, sigma_B1 * share_BD]) @ basis_DD.T

        with _full_precision(z_t_BCHW):
            if not self.conditional:
                means_2BD = means(self.variance_D, self.basis_DD)
            else:
                means_2BD = means(self.given_variance_D, self.given_basis_DD)
                if given.keep_B is not None:
                    without_2BD = means(self.variance_D, self.basis_DD)
                    means_2BD = torch.where(given.keep_B[:, None], means_2BD, without_2BD)
        z_BD, eps_BD = means_2BD
        return (given.mean_BD + z_BD).view(z_t_BCHW.shape), eps_BD.view(z_t_BCHW.shape)


def _full_precision(like: Tensor) -> torch.autocast:
    """No autocast; on the CPU's terms for tensors that are nowhere, of which sizes are counted."""
    return torch.autocast("cuda" if like.is_cuda else "cpu", enabled=False)


def _directions(prefix: str, covariance_DD: Tensor) -> dict[str, Tensor]:
    """Eigenvalues and eigenvectors of a covariance."""
    variance_D, basis_DD = torch.linalg.eigh(covariance_DD)
    return {f"{prefix}variance": variance_D.clamp(min=LEAST_VARIANCE), f"{prefix}basis": basis_DD}
