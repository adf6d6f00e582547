"""`vae:SIDE`: the moments of an `AutoencoderKL`, Stable Diffusion's above all."""

from __future__ import annotations

from featurize.checkpoints.autoencoder_kl import SD_SCALE, describe_autoencoder, load_autoencoder
from featurize.checkpoints.files import sha256_of
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

FLAG = "--z0-weights"


def describe(spec: CodecSpec) -> CodecDescription:
    """The posterior's means, then its log-variances, (side / f) x (side / f) x 2c for a VAE that reduces by f."""
    file = describe_autoencoder(spec.weights, FLAG)
    side = cells_per_side(spec, file.factor)
    own_scale = float(file.config.get("scaling_factor", SD_SCALE))
    attributes = {
        "name": "vae",
        "size": spec.size,
        "moments": True,
        "scale": spec.scale or (spec.sd_scale if own_scale == SD_SCALE else own_scale),
        "weights": str(file.path),
        "weights_sha256": sha256_of(file.path),
        "layout": file.layout,
        "config": file.config,
    }
    return described(spec, (side, side, file.channels), 2 * file.channels, attributes)


def build(spec: CodecSpec, description: CodecDescription) -> Codec:
    """diffusers' AutoencoderKL."""
    vae = load_autoencoder(describe_autoencoder(spec.weights, FLAG), FLAG)
    return loaded(description, encode_with(vae, spec, lambda x_BCHW: vae.encode(x_BCHW).latent_dist.parameters))


KIND = Kind(
    describe,
    build,
    lambda side: ((side // 8, side // 8, 4), 8),
    imports=("torch", "diffusers.models.autoencoders.autoencoder_kl"),
)
