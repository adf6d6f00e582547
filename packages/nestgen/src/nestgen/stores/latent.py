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
    x_BhwC = values_BhwC.float()
    if codec is None:
        return x_BhwC
    if codec["moments"]:
        assert noise_Bhwc is not None
        mean_Bhwc, logvar_Bhwc = (part.contiguous() for part in x_BhwC.chunk(2, -1))
        deviation_Bhwc = logvar_Bhwc.clamp_(-30, 20).mul_(0.5).exp_()
        x_BhwC = mean_Bhwc.add_(deviation_Bhwc.mul_(noise_Bhwc))
    return x_BhwC * codec["scale"]
