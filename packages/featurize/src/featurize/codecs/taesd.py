"""`taesd:SIDE`: the tiny autoencoder for Stable Diffusion's latents (Bohan), a light stand-in for the VAE.

It was distilled from Stable Diffusion's VAE and gives its scaled latent directly: there are no moments to sample from,
and its scale is 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from featurize.checkpoints.downloads import PUBLISHED, find_weights
from featurize.checkpoints.files import fit, read_description, read_state_dict, sha256_of
from featurize.codecs.codec import (
    Codec,
    CodecDescription,
    CodecSpec,
    Kind,
    cells_per_side,
    described,
    encode_with,
    loaded,
)
from featurize.errors import UserError
from featurize.io.home import expand_home

FLAG = "--z0-weights"
# What `madebyollin/taesd` says of itself, for a file that comes without its config.json.
TAESD_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "encoder_block_out_channels": [64, 64, 64, 64],
    "decoder_block_out_channels": [64, 64, 64, 64],
    "act_fn": "relu",
    "latent_channels": 4,
    "upsampling_scaling_factor": 2,
    "num_encoder_blocks": [1, 3, 3, 3],
    "num_decoder_blocks": [3, 3, 3, 1],
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "force_upcast": False,
    "scaling_factor": 1.0,
}


def describe(spec: CodecSpec) -> CodecDescription:
    """The latent itself, (side / 8) x (side / 8) x 4."""
    path = expand_home(spec.weights) if spec.weights else None
    if path is not None and path.is_dir():
        path = path / "diffusion_pytorch_model.safetensors"
    file = find_weights(str(path) if path else None, PUBLISHED["taesd"], "the codec taesd", FLAG)
    described_beside = read_description(file.with_name("config.json"))
    config = {key: value for key, value in described_beside.items() if not key.startswith("_")} or TAESD_CONFIG
    for key in ("encoder_block_out_channels", "latent_channels"):
        if key not in config:
            raise UserError(
                f"{file.with_name('config.json')} does not give {key}; take the autoencoder's own config.json."
            )
    side = cells_per_side(spec, 2 ** (len(config["encoder_block_out_channels"]) - 1))
    channels = int(config["latent_channels"])
    attributes = {
        "name": "taesd",
        "size": spec.size,
        "moments": False,
        "scale": spec.scale or 1.0,
        "weights": str(file.absolute()),  # links stay, as those of the Hugging Face cache have the suffix
        "weights_sha256": sha256_of(file),
        "layout": "diffusers",
        "config": config,
    }
    return described(spec, (side, side, channels), channels, attributes)


def build(spec: CodecSpec, description: CodecDescription) -> Codec:
    """diffusers' AutoencoderTiny."""
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    file = Path(description.attributes["weights"])
    try:
        model = AutoencoderTiny.from_config(description.attributes["config"])
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        raise UserError(
            f"The configuration of {file} builds no AutoencoderTiny: {str(error).splitlines()[0]}."
        ) from None
    fit(model, read_state_dict(file), file, f"{FLAG} names an AutoencoderTiny in diffusers' layout")
    return loaded(description, encode_with(model, spec, lambda x_BCHW: model.encode(x_BCHW).latents))


KIND = Kind(
    describe,
    build,
    lambda side: ((side // 8, side // 8, 4), 4),
    imports=("torch", "diffusers.models.autoencoders.autoencoder_tiny"),
)
