"""`vae:SIDE`: the moments of an `AutoencoderKL`, Stable Diffusion's above all."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featurize.checkpoints.downloads import PLACES, find_weights
from featurize.checkpoints.files import State, fit, read_description, read_state_dict, sha256_of
from featurize.codecs import SD_SCALE, Codec, CodecSpec
from featurize.errors import UserError

EMBEDDED = "tiny"  # as weights: the small VAE that ships with the package (docs/tiny.md)
PUBLISHED = ("sd-v1", "sd-vae-ft-ema", "sd-vae-ft-mse")  # as weights: fetched by name; the first is the default
FLAG = "--z0-weights"

# Stable Diffusion's autoencoder, for files that come without a config.json.
SD_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 256,
    "scaling_factor": SD_SCALE,
}
# diffusers' own first name of an attention's layers, still that of the published files.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def build(spec: CodecSpec) -> Codec:
    """The posterior's means, then its log-variances, (side / f) x (side / f) x 2c for a VAE that reduces by f."""
    vae, file, config, layout = load_vae(spec.weights)
    vae.eval().requires_grad_(False).to(spec.device)
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    if spec.size % factor:
        raise UserError(
            f"vae:{spec.size} can't be: this VAE reduces by {factor}, so the side must be a multiple of it."
        )
    channels = int(config["latent_channels"])

    def encode(x_BHWC: np.ndarray) -> np.ndarray:
        x_BCHW = torch.from_numpy(x_BHWC).to(spec.device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
        with torch.inference_mode():
            moments = vae.encode(x_BCHW).latent_dist.parameters
        return moments.permute(0, 2, 3, 1).float().cpu().numpy()

    own_scale = float(config.get("scaling_factor", SD_SCALE))
    attributes = {
        "name": "vae",
        "size": spec.size,
        "moments": True,
        "scale": spec.scale or (spec.sd_scale if own_scale == SD_SCALE else own_scale),
        "weights": str(file),
        "weights_sha256": sha256_of(file),
        "layout": layout,
        "config": config,
    }
    hashed = {key: value for key, value in attributes.items() if key != "weights"}
    return Codec(
        name="vae",
        size=spec.size,
        interpolation="bicubic",
        latent_shape=(spec.size // factor, spec.size // factor, channels),
        stored_channels=2 * channels,
        encode=encode,
        attributes=attributes,
        identity=hashed | {"interpolation": "bicubic"},
    )


def load_vae(weights: str | None, flag: str = FLAG) -> tuple[Any, Path, dict[str, Any], str]:
    """(AutoencoderKL, its file, its configuration, `diffusers` or `original`: how the file names its tensors).

    `weights` is a published name, `tiny`, a folder in diffusers' layout, or a file: diffusers', or CompVis' original
    (`autoencoder_kl.pth`). A config.json beside the file describes it; without one it must be Stable Diffusion's.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # all of diffusers takes seconds to import

    file = _file(weights, flag)
    described = read_description(file.with_name("config.json"))
    config = {key: value for key, value in described.items() if not key.startswith("_")} or SD_CONFIG
    try:
        vae = AutoencoderKL.from_config(config)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"The VAE in {file.parent} can't be loaded: {str(error).splitlines()[0]}.") from None
    state, layout = _in_diffusers_layout(read_state_dict(file), file, config)
    fit(vae, state, file, f"{flag} names an AutoencoderKL and the config.json beside it describes it")
    return vae, file.resolve(), config, layout


def _file(weights: str | None, flag: str) -> Path:
    if weights == EMBEDDED:
        return Path(str(files("featurize"))) / "weights" / "tiny_vae" / "diffusion_pytorch_model.safetensors"
    if weights is None or (weights in PUBLISHED and not Path(weights).exists()):
        name = weights or PUBLISHED[0]
        return find_weights(None, PLACES[name], f"the VAE {name}", flag)
    path = Path(weights).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"The VAE's {path / 'config.json'} is not there; a folder is in diffusers' AutoencoderKL layout."
            )
        path = path / "diffusion_pytorch_model.safetensors"
    return find_weights(str(path), None, "the VAE", flag)


def _in_diffusers_layout(state: State, file: Path, config: dict[str, Any]) -> tuple[State, str]:
    state = {key.removeprefix("first_stage_model."): value for key, value in state.items()}
    if not any(key.startswith("encoder.down.") for key in state):
        return {_renamed(key): value for key, value in state.items()}, "diffusers"
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    # Of a whole training checkpoint only the autoencoder: losses and discriminators are nothing to us.
    own = {
        key: value for key, value in state.items() if re.match(r"(encoder|decoder|quant_conv|post_quant_conv)\.", key)
    }
    try:
        converted = convert_ldm_vae_checkpoint(own, config)
    except (KeyError, IndexError) as error:
        raise UserError(f"The VAE {file} is not in CompVis' original layout (no {error}); take a whole file.") from None
    if len(converted) != len(own):
        raise UserError(
            f"The VAE {file} has {len(own)} tensors in CompVis' original layout, but {len(converted)} find a place; "
            "a config.json beside it must describe it."
        )
    return converted, "original"


def _renamed(key: str) -> str:
    return re.sub(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{_OLD_ATTENTION[m[2]]}.", key)
