"""CLIP's vision transformers (Radford et al. 2021), built by open_clip."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from featurize.checkpoints.clip import ACTIVATIONS, activation_layer, prove_activation, read_clip
from featurize.checkpoints.downloads import PUBLISHED, find_weights
from featurize.checkpoints.files import fit, sidecar
from featurize.encoders.encoder import (
    RESAMPLE,
    Encoder,
    EncoderDescription,
    EncoderSpec,
    Kind,
    Variant,
    described,
    loaded,
    network_of,
    patch_grid,
    variant_of,
)
from featurize.errors import UserError
from featurize.execution.precision import convert_weights

if TYPE_CHECKING:
    from torch import Tensor

NORMS = ("ln_post", "none")


def _variant(name: str, width: int, layers: int, patch: int, embed: int) -> Variant:
    return Variant(
        network={
            "img_size": 224, "patch_size": patch, "width": width, "layers": layers, "heads": width // 64,
            "embed_dim": embed, "activation": "quick_gelu", "norm": "ln_post", "projection": False,
        },
        layer="last block, patch tokens",
        norm="ln_post",
        input_size=224,
        output=(224 // patch, 224 // patch, width),
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        interpolation="bicubic",
        resize=224,
        published=PUBLISHED[name],
    )  # fmt: skip


VARIANTS = {
    "": _variant("clip-vit_b16", 768, 12, 16, 512),
    "vit_b32": _variant("clip-vit_b32", 768, 12, 32, 512),
    "vit_l14": _variant("clip-vit_l14", 1024, 24, 14, 768),
}


def describe(spec: EncoderSpec) -> EncoderDescription:
    """Patch tokens of the last block after ln_post, without the projection to the joint space.

    The paper's maps have 768 channels, so the projection (to 512) is not applied. ln_post is, although CLIP itself applies it
    to the class token only: without it a few tokens with very large norms take the first directions of the basis, and the
    other encoders' tokens are normed likewise. `--model-args norm=none` and `projection=true` give the other readings.
    """
    variant = variant_of(spec, VARIANTS)
    weights = find_weights(spec.weights, variant.published, spec.name)
    network = network_of(spec, variant, sidecar(weights), resamples=True)
    _check(network, spec.name)
    return described(
        spec, variant, network, weights, patch_grid(spec, network), network["embed_dim" if network["projection"] else "width"],
        norm=network["norm"], affine=network["norm"] == "ln_post", projection=network["projection"], prefix_tokens_dropped=1,
        activation=network["activation"],
    )  # fmt: skip


def build(spec: EncoderSpec, description: EncoderDescription, device: str) -> Encoder:
    """open_clip's vision tower, whose activation the file confirms where it names one."""
    from open_clip.transformer import LayerNorm, VisionTransformer  # all of open_clip takes seconds to import

    from featurize.encoders.vit import with_resampled_positions

    weights, network = description.weights_file, description.network
    file = read_clip(weights)
    witness = prove_activation(
        file, network["activation"], weights, spec.name, f"say --model-args activation={file.activation}"
    )
    model = VisionTransformer(
        image_size=network["img_size"],
        patch_size=network["patch_size"],
        width=network["width"],
        layers=network["layers"],
        heads=network["heads"],
        mlp_ratio=4.0,
        output_dim=network["embed_dim"],
        act_layer=activation_layer(network["activation"]),
        norm_layer=LayerNorm,
    )
    visual = file.visual
    if network.get(RESAMPLE):
        visual = with_resampled_positions(visual, "positional_embedding", description.grid, 1, weights)
    fit(model, visual, weights, "check that it is the encoder's own file, or what --model-args says of it "
        f"({RESAMPLE}=true resamples positions of another size)")  # fmt: skip
    model.eval().requires_grad_(False).to(device)
    convert_weights(model, spec.precision)
    norm, projection = network["norm"] == "ln_post", network["projection"]

    def forward(x_BCHW: Tensor) -> Tensor:
        found = model.forward_intermediates(
            x_BCHW, indices=1, normalize_intermediates=norm, intermediates_only=True, output_fmt="NLC"
        )
        tokens_BND = found["image_intermediates"][0]
        if projection:
            tokens_BND = tokens_BND @ model.proj
        return tokens_BND.unflatten(1, model.grid_size)

    return loaded(description, forward, witness)


def _check(network: Mapping[str, Any], name: str) -> None:
    for key, allowed in (("activation", ACTIVATIONS), ("norm", NORMS), ("projection", (True, False))):
        if network[key] not in allowed:
            known = ", ".join(str(value).lower() for value in allowed)
            raise UserError(f"The encoder {name} has no {key} '{network[key]}'; known are {known}.")
    if network["width"] % network["heads"]:
        raise UserError(
            f"The encoder {name} can't have {network['heads']} heads of {network['width']} channels together."
        )


KIND = Kind(describe, build, VARIANTS, imports=("torch", "open_clip"))
