"""From stored values to what a denoiser sees."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_latent(values_BhwC: np.ndarray, codec: dict[str, Any] | None, noise_BCHW: Tensor | None) -> Tensor:
    """The latents (B, C, H, W), float32, of stored values (B, h, w, c).

    `codec` is z_0's, None for the levels above, which are taken as they are. z_0 is multiplied by the codec's scale. A
    codec that stores moments has twice the channels: the latent is then a sample of the posterior,
    mean + exp(log-variance / 2) noise, the log-variance within -30..20 as in diffusers' AutoencoderKL.
    """
    # In numpy: torch's threads would take turns with those of the training step.
    x_BCHW = np.ascontiguousarray(values_BhwC.transpose(0, 3, 1, 2), np.float32)
    if codec is None:
        return torch.from_numpy(x_BCHW)
    if codec["moments"]:
        mean_BCHW, logvar_BCHW = np.split(x_BCHW, 2, 1)
        assert noise_BCHW is not None
        x_BCHW = mean_BCHW + np.exp(0.5 * logvar_BCHW.clip(-30, 20)) * noise_BCHW.numpy()
    return torch.from_numpy(np.float32(codec["scale"]) * x_BCHW)
