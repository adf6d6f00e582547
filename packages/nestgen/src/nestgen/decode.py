"""From `z_0` to pictures, by the codec that its store names (docs/store-format.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nestgen.errors import UserError
from nestgen.files import sha256_of

# z_0 as the denoiser sees it, (B, C, H, W), to uint8 pictures (B, height, width, 3).
Decoder = Callable[[Tensor], np.ndarray]


def load_decoder(codec: Mapping[str, Any], vae: Path | None = None, device: str = "cpu") -> Decoder:
    """The decoder of a codec: `pixels`, or `vae`, whose weights are where the codec says or in the file `vae`.

    Raises UserError for weights that are missing, of another digest than the codec's, or do not fit.
    """
    scale = codec["scale"]
    if codec["name"] == "pixels":
        if vae is not None:
            raise UserError("z_0 of this model is pixels and needs no VAE; leave --vae out")
        return lambda z_BCHW: to_uint8(z_BCHW / scale)
    model = _load_vae(codec, vae or Path(codec["weights"])).to(device)

    @torch.inference_mode()
    def decode(z_BCHW: Tensor) -> np.ndarray:
        return to_uint8(model.decode(z_BCHW.to(device) / scale).sample)

    return decode


def to_uint8(x_BCHW: Tensor) -> np.ndarray:
    """Pixel values, uint8 / 127.5 - 1, to uint8 (B, H, W, C): rounded to the nearest and clipped."""
    return ((x_BCHW + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def _load_vae(codec: Mapping[str, Any], file: Path) -> Any:
    if not file.is_file():
        raise UserError(f"the VAE's weights {file} are not there; name the file with --vae FILE")
    if sha256_of(file) != codec["weights_sha256"]:
        raise UserError(f"{file} is not the VAE that encoded z_0 (another sha256); name that one with --vae FILE")
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # takes seconds to import

    try:
        model = AutoencoderKL.from_config(codec["config"])
        state = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
        model.load_state_dict(state)
    except (SafetensorError, UnpicklingError, OSError, RuntimeError, ValueError, TypeError) as error:
        # Not the message: torch's tells how to let a pickle run code.
        raise UserError(
            f"the VAE {file} cannot be loaded ({type(error).__name__}): it does not hold the weights of the "
            "AutoencoderKL that z_0's store describes; name the right file with --vae FILE"
        ) from None
    return model.float().eval().requires_grad_(False)
