"""The image itself as features: what an encoder without semantics is worth, for the ablation in small."""

from __future__ import annotations

from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from torch import Tensor

VARIANTS = {
    "": Variant(
        network={"img_size": 64, "patch_size": 8},
        layer="values of each patch",
        norm="none",
        input_size=64,
        output=(8, 8, 192),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        interpolation="bicubic",
        resize=None,
    )
}


def describe(spec: EncoderSpec) -> EncoderDescription:
    """`pixels`: a patch's pixels are its channels, 8x8x192 for patches of 8 pixels of an image of 64.

    The grid and the crop are those of `tiny`, so that nothing differs but the features. There are no weights.
    """
    if spec.weights is not None:
        raise UserError("The encoder pixels has no weights; leave --weights out.")
    variant = variant_of(spec, VARIANTS)
    network = network_of(spec, variant, {})
    size, patch = int(network["img_size"]), int(network["patch_size"])
    if patch < 1 or size < patch or size % patch:
        raise UserError(f"The encoder pixels can't cut {size} pixels into patches of {patch}; give a divisor.")
    return described(spec, variant, network, None, (size // patch, size // patch), 3 * patch**2)


def build(spec: EncoderSpec, description: EncoderDescription, device: str) -> Encoder:
    """Nothing is loaded."""
    from torch.nn import functional

    def forward(x_BCHW: Tensor) -> Tensor:
        return functional.pixel_unshuffle(x_BCHW, int(description.network["patch_size"])).permute(0, 2, 3, 1)

    return loaded(description, forward)


KIND = Kind(describe, build, VARIANTS, weights="none", imports=("torch",))
