"""From stored values to what a denoiser sees."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_latent(values_BhwC: np.ndarray, codec: dict[str, Any] | None, noise_BCHW: Tensor | None) -> Tensor:
    """The latents (B, C, H, W), float32, of stored values (B, h, w, c); in memory they stay (B, H, W, C)."""
    noise_Bhwc = None if noise_BCHW is None else noise_BCHW.permute(0, 2, 3, 1)
    return latent(torch.from_numpy(values_BhwC), codec, noise_Bhwc).permute(0, 3, 1, 2)


def latent(values_BhwC: Tensor, codec: dict[str, Any] | None, noise_Bhwc: Tensor | None) -> Tensor:
    """The latents (B, h, w, c), float32, of stored values on any device.

    `codec` is z_0's, None for the levels above, which are taken as they are. z_0 is multiplied by the codec's scale. A
    codec that stores moments has twice the channels: the latent is then a sample of the posterior,
    mean + exp(log-variance / 2) noise, the log-variance within -30..20 as in diffusers' AutoencoderKL.
    """
    if codec is None or not codec["moments"]:
        x_BhwC = values_BhwC.float()
        return x_BhwC if codec is None else x_BhwC * codec["scale"]
    assert noise_Bhwc is not None
    mean_Bhwc, logvar_Bhwc = (part.float() for part in _halves(values_BhwC))
    deviation_Bhwc = logvar_Bhwc.clamp_(-30, 20).mul_(0.5).exp_()
    return mean_Bhwc.add_(deviation_Bhwc.mul_(noise_Bhwc)).mul_(codec["scale"])


def _halves(values_BhwC: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the last half of the channels, (B, h, w, c) each, in memory of their own.

    On a CPU numpy copies each place's channels as one item, in half the time in which torch copies them one by one.
    """
    if values_BhwC.device.type != "cpu":
        first_Bhwc, last_Bhwc = values_BhwC.chunk(2, -1)
        return first_Bhwc.contiguous(), last_Bhwc.contiguous()
    values = values_BhwC.numpy()
    item = np.dtype((np.void, values.shape[-1] // 2 * values.itemsize))
    places_Bhw2 = np.ascontiguousarray(values).view(item)
    halves = (places_Bhw2[..., i : i + 1].copy().view(values.dtype) for i in (0, 1))
    first_Bhwc, last_Bhwc = (torch.from_numpy(one) for one in halves)
    return first_Bhwc, last_Bhwc
