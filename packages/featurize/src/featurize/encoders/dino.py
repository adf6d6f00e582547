"""DINO (Caron et al. 2021) and DINOv2 with registers (Oquab et al. 2023, Darcet et al. 2024), from the official backbones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from featurize.checkpoints.downloads import PUBLISHED, find_weights
from featurize.checkpoints.files import fit, read_checkpoint, sidecar, tensors_of
from featurize.checkpoints.unwrap import without_prefixes
from featurize.encoders.encoder import (
    IMAGENET_MEAN,
    IMAGENET_STD,
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

    from featurize.checkpoints.files import State

BACKBONE = "backbone."  # before the names in a training's checkpoint, whose others are of the projection head


def _variant(name: str, width: int, depth: int, heads: int, patch: int, registers: int) -> Variant:
    return Variant(
        network={
            "img_size": 224, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads,
            "registers": registers,
        },
        layer="last block, patch tokens",
        norm="final LayerNorm",
        input_size=224,
        output=(224 // patch, 224 // patch, width),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        interpolation="bicubic",
        resize=256,
        published=PUBLISHED[name],
    )  # fmt: skip


VARIANTS = {
    "": _variant("dino-vitb16", 768, 12, 12, 16, 0),
    "vitb8": _variant("dino-vitb8", 768, 12, 12, 8, 0),
    "vits16": _variant("dino-vits16", 384, 12, 6, 16, 0),
    "vits8": _variant("dino-vits8", 384, 12, 6, 8, 0),
    "dinov2_vits14_reg": _variant("dinov2-vits14_reg", 384, 12, 6, 14, 4),
    "dinov2_vitb14_reg": _variant("dinov2-vitb14_reg", 768, 12, 12, 14, 4),
    "dinov2_vitl14_reg": _variant("dinov2-vitl14_reg", 1024, 24, 16, 14, 4),
}


def describe(spec: EncoderSpec) -> EncoderDescription:
    """Patch tokens of the last block after the final LayerNorm; class and register tokens are dropped."""
    variant = variant_of(spec, VARIANTS)
    weights = find_weights(spec.weights, variant.published, spec.name)
    network = network_of(spec, variant, sidecar(weights), resamples=True)
    return described(
        spec, variant, network, weights, patch_grid(spec, network), network["embed_dim"],
        affine=True, projection=False, prefix_tokens_dropped=1, register_tokens_dropped=network["registers"],
        activation="gelu",
    )  # fmt: skip


def build(spec: EncoderSpec, description: EncoderDescription, device: str) -> Encoder:
    """The backbone in timm's layout.

    DINOv2's position embedding is of 37 x 37 patches; as its own code does for the models with registers, it is resampled
    to the image's grid with antialiased bicubic interpolation.
    """
    from featurize.encoders.vit import build_vit, patch_map, with_resampled_positions

    weights, network = description.weights_file, description.network
    registers = network["registers"]
    state = _backbone(weights)
    if registers:
        state = _as_timm(state, network["img_size"] // network["patch_size"])
        model = build_vit(network, spec.name, reg_tokens=registers, no_embed_class=True, init_values=1.0)
    else:
        model = build_vit(network, spec.name)
        if network.get(RESAMPLE):
            state = with_resampled_positions(state, "pos_embed", description.grid, 1, weights)
    fit(model, state, weights, "check that it is the encoder's own backbone file, or what --model-args says of it "
        f"({RESAMPLE}=true resamples positions of another size)")  # fmt: skip
    model.eval().requires_grad_(False).to(device)
    convert_weights(model, spec.precision)
    return loaded(description, lambda x_BCHW: patch_map(model, x_BCHW))


def _backbone(weights: Path) -> State:
    """The backbone's tensors; of a training's checkpoint those of the teacher, as DINO's own evaluations take."""
    checkpoint = read_checkpoint(weights)
    if "student" in checkpoint and "teacher" not in checkpoint:
        raise UserError(
            f"The weights {weights} hold DINO's student alone, and its features are the teacher's; take the whole."
        )
    state = without_prefixes(tensors_of(checkpoint, weights, "teacher"))
    backbone = {key.removeprefix(BACKBONE): value for key, value in state.items() if key.startswith(BACKBONE)}
    for prefix in ("linear.", "head."):
        if not backbone and any(key.startswith(prefix) for key in state):
            raise UserError(
                f"The weights {weights} are of a probe or a head, not the backbone alone (keys begin with '{prefix}'); take "
                "the file that the official repository calls 'backbone only', or its 'full ckpt'."
            )
    return backbone or state


def _as_timm(state: State, side: int) -> State:
    """DINOv2's keys and position embedding as timm holds them: the class token's position is added to the token."""
    state = {key: value for key, value in state.items() if key != "mask_token"}
    if "register_tokens" in state:
        state["reg_token"] = state.pop("register_tokens")
    if "pos_embed" in state and "cls_token" in state:
        position_1ND = state.pop("pos_embed")
        state["cls_token"] = state["cls_token"] + position_1ND[:, :1]
        state["pos_embed"] = _resample(position_1ND[:, 1:], side)
    return state


def _resample(position_1ND: Tensor, side: int) -> Tensor:
    from torch.nn import functional

    own = round(position_1ND.shape[1] ** 0.5)
    if own == side or own * own != position_1ND.shape[1]:
        return position_1ND
    grid_1DHW = position_1ND.unflatten(1, (own, own)).permute(0, 3, 1, 2)
    resampled = functional.interpolate(
        grid_1DHW, size=(side, side), mode="bicubic", antialias=True, align_corners=False
    )
    return resampled.permute(0, 2, 3, 1).flatten(1, 2)


KIND = Kind(describe, build, VARIANTS)
