"""From z_0 to images, by the codec that its store names (docs/store-format.md)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
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


@dataclass(frozen=True)
class Decoder:
    """From z_0 as the denoiser sees it, (B, C, H, W), to uint8 images (B, height, width, 3); without a VAE z_0 is pixels."""

    scale: float
    vae: Any = None
    file: Path | None = None  # of the VAE's weights

    @torch.inference_mode()
    def __call__(self, z_BCHW: Tensor) -> np.ndarray:
        """The images, on the CPU."""
        if self.vae is None:
            return to_uint8(z_BCHW / self.scale)
        weight = next(self.vae.parameters())
        return to_uint8(self.vae.decode(z_BCHW.to(weight.device, weight.dtype) / self.scale).sample)

    def to(self, device: torch.device) -> None:
        """Moves the VAE to a device, in place."""
        if self.vae is not None:
            self.vae.to(device)


def load_decoder(codec: Mapping[str, Any], vae: Path | None = None, device: str = "cpu") -> Decoder:
    """The decoder of a codec: `pixels`, or `vae`, `taesd` or that of an installed package, whose weights are where the codec
    says or in the file `vae`.

    Raises UserError for weights that are missing, of another digest than the codec's, or do not fit.
    """
    if codec["name"] == "pixels":
        if vae is not None:
            raise UserError("z_0 of this model is pixels and needs no VAE; leave --vae out")
        return Decoder(codec["scale"])
    file = vae or Path(codec["weights"])
    return Decoder(codec["scale"], _load_vae(codec, file).to(device), file)


def to_uint8(x_BCHW: Tensor) -> np.ndarray:
    """Pixel values, uint8 / 127.5 - 1, to uint8 (B, H, W, C): rounded to the nearest and clipped."""
    return ((x_BCHW + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def _load_vae(codec: Mapping[str, Any], file: Path) -> Any:
    """The AutoencoderKL, or for `taesd` the AutoencoderTiny, that a codec describes, or an installed package's own."""
    if not file.is_file():
        raise UserError(f"the VAE's weights {file} are not there; name the file with --vae FILE")
    if sha256_of(file) != codec["weights_sha256"]:
        raise UserError(f"{file} is not the VAE that encoded z_0 (another sha256); name that one with --vae FILE")
    if codec["name"] not in ("vae", "taesd"):
        return _installed(codec["name"])(codec, file)
    # All of diffusers takes seconds to import.
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    kind = AutoencoderTiny if codec["name"] == "taesd" else AutoencoderKL
    try:
        model = kind.from_config(codec["config"])
        state = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
        model.load_state_dict(_in_diffusers_layout(state, codec))
    except (SafetensorError, UnpicklingError, OSError, LookupError, RuntimeError, ValueError, TypeError) as error:
        # Not the message: torch's tells how to let a pickle run code.
        raise UserError(
            f"the VAE {file} cannot be loaded ({type(error).__name__}): it does not hold the weights of the "
            f"{kind.__name__} that z_0's store describes; name the right file with --vae FILE"
        ) from None
    return model.float().eval().requires_grad_(False)


def _installed(codec: str) -> Callable[[Mapping[str, Any], Path], Any]:
    """What loads the decoder of a codec that is not ours: an entry point of `nestgen.decoders` (docs/encoders.md)."""
    for point in entry_points(group="nestgen.decoders", name=codec):
        return point.load()
    raise UserError(
        f"there is no decoder for the codec {codec} of z_0; install the package that has it (entry point nestgen.decoders)"
    )


def _in_diffusers_layout(state: dict[str, Tensor], codec: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors under diffusers' names of today: its published files have older ones, CompVis' originals have their own."""
    state = state.get("state_dict", state)  # type: ignore[assignment]
    state = {key.removeprefix("first_stage_model."): value for key, value in state.items()}
    if codec.get("layout") == "original":
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
        return convert_ldm_vae_checkpoint({k: v for k, v in state.items() if k.startswith(parts)}, codec["config"])
    older = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    pattern = re.compile(rf"(attentions\.\d+)\.({'|'.join(older)})\.")
    return {pattern.sub(lambda m: f"{m[1]}.{older[m[2]]}.", key): value for key, value in state.items()}
