"""The VAE's own bottleneck as features: the ablation that shows what semantic features are good for."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from featurize.codecs.vae import load_vae
from featurize.encoders import Encoder, EncoderSpec, Kind, Variant, loaded, network_of, variant_of

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


def build(spec: EncoderSpec, device: str) -> Encoder:
    """`vae`: the map of the encoder's middle block, 32x32x512 for Stable Diffusion's at 256 px; `vae:latent`: the posterior's
    mean, 32x32x4.

    The paper's VAE levels have up to 32 channels, more than the latent has, so its bottleneck is read as the middle
    block's map. Weights are those of the codec `vae`: a name, a folder or a file.
    """
    variant = variant_of(spec)
    vae, weights, config, _ = load_vae(spec.weights, "--weights")
    network = network_of(spec, variant, {})
    vae.eval().requires_grad_(False).to(device)
    encoder = vae.encoder

    def forward(x_BCHW: Tensor) -> Tensor:
        if spec.name.endswith(":latent"):
            return vae.encode(x_BCHW).latent_dist.mean.permute(0, 2, 3, 1)
        f_BCHW = encoder.conv_in(x_BCHW)
        for block in encoder.down_blocks:
            f_BCHW = block(f_BCHW)
        return encoder.mid_block(f_BCHW).permute(0, 2, 3, 1)

    return loaded(spec, variant, network, weights, device, forward, affine=False, projection=False, config=config)


KIND = Kind(build, VARIANTS)
