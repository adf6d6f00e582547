"""The VAE's own bottleneck as features: the ablation that shows what semantic features are good for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from featurize.checkpoints.autoencoder_kl import describe_autoencoder, load_autoencoder
from featurize.encoders.encoder import (
    Encoder,
    EncoderDescription,
    EncoderSpec,
    Kind,
    Variant,
    described,
    loaded,
    network_of,
    variant_of,
)
from featurize.errors import UserError
from featurize.execution.precision import convert_weights

if TYPE_CHECKING:
    from torch import Tensor

FLAG = "--weights"

VARIANTS = {
    "": Variant(
        network={"img_size": 256},
        layer="middle block of the VAE's encoder",
        norm="none",
        input_size=256,
        output=(32, 32, 512),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        interpolation="bicubic",
        resize=None,
    ),
}
VARIANTS["latent"] = replace(VARIANTS[""], layer="mean of the VAE's posterior", output=(32, 32, 4))


def describe(spec: EncoderSpec) -> EncoderDescription:
    """`vae`: the map of the encoder's middle block, 32x32x512 for Stable Diffusion's at 256 px; `vae:latent`: the posterior's
    mean, 32x32x4.

    The paper's VAE levels have up to 32 channels, more than the latent has, so its bottleneck is read as the middle
    block's map. Weights are those of the codec `vae`: a name, a folder or a file.
    """
    variant = variant_of(spec, VARIANTS)
    file = describe_autoencoder(spec.weights, FLAG)
    network = network_of(spec, variant, {})
    side = int(network["img_size"]) // file.factor
    if side < 1:
        raise UserError(
            f"The encoder {spec.name} reduces by {file.factor}; give it more than {network['img_size']} pixels."
        )
    channels = file.channels if _is_latent(spec) else file.width
    return described(
        spec, variant, network, file.path, (side, side), channels, affine=False, projection=False, config=file.config
    )


def build(spec: EncoderSpec, description: EncoderDescription, device: str) -> Encoder:
    """diffusers' AutoencoderKL."""
    vae = load_autoencoder(describe_autoencoder(spec.weights, FLAG), FLAG)
    vae.eval().requires_grad_(False).to(device)
    convert_weights(vae, spec.precision)
    encoder = vae.encoder

    def forward(x_BCHW: Tensor) -> Tensor:
        if _is_latent(spec):
            return vae.encode(x_BCHW).latent_dist.mean.permute(0, 2, 3, 1)
        f_BCHW = encoder.conv_in(x_BCHW)
        for block in encoder.down_blocks:
            f_BCHW = block(f_BCHW)
        return encoder.mid_block(f_BCHW).permute(0, 2, 3, 1)

    return loaded(description, forward)


def _is_latent(spec: EncoderSpec) -> bool:
    return spec.name.endswith(":latent")


KIND = Kind(
    describe,
    build,
    VARIANTS,
    weights="as the codec vae's",
    imports=("torch", "diffusers.models.autoencoders.autoencoder_kl"),
)
