"""MoCo-v3's vision transformers (Chen, Xie, He 2021), from the official pre-training files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurize.checkpoints.downloads import PUBLISHED, RemoteFile, find_weights
from featurize.checkpoints.files import fit, read_checkpoint, sidecar, tensors_of
from featurize.encoders.encoder import (
    IMAGENET_MEAN,
    IMAGENET_STD,
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

PREFIX = "module.base_encoder."
HEAD = "head."


def _variant(arch: str, width: int, depth: int, heads: int, published: RemoteFile | None) -> Variant:
    return Variant(
        network={
            "arch": arch, "img_size": 224, "patch_size": 16, "embed_dim": width, "depth": depth, "num_heads": heads,
        },
        layer="last block, patch tokens",
        norm="final LayerNorm",
        input_size=224,
        output=(14, 14, width),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        interpolation="bilinear",
        resize=256,
        published=published,
    )  # fmt: skip


# MoCo-v3's small ViT has 12 heads, twice as many as other people's. Its large one was never published by its authors;
# RCG's authors did, so it comes with --weights.
VARIANTS = {
    "": _variant("vit_base", 768, 12, 12, PUBLISHED["mocov3-vit_base"]),
    "vit_small": _variant("vit_small", 384, 12, 12, PUBLISHED["mocov3-vit_small"]),
    "vit_large": _variant("vit_large", 1024, 24, 16, None),
}


def describe(spec: EncoderSpec) -> EncoderDescription:
    """Patch tokens of the last block after the final LayerNorm; the projection head is dropped."""
    variant = variant_of(spec, VARIANTS)
    weights = find_weights(spec.weights, variant.published, spec.name)
    network = network_of(spec, variant, sidecar(weights))
    return described(
        spec, variant, network, weights, patch_grid(spec, network), network["embed_dim"],
        affine=True, projection=False, prefix_tokens_dropped=1, activation="gelu",
    )  # fmt: skip


def build(spec: EncoderSpec, description: EncoderDescription, device: str) -> Encoder:
    """The backbone in timm's layout."""
    from featurize.encoders.vit import build_vit, patch_map

    weights, network = description.weights_file, description.network
    state = base_encoder(weights, network)
    backbone = {key: value for key, value in state.items() if not key.startswith(HEAD)}
    model = build_vit(network, spec.name)
    load_backbone(model, backbone, weights, network)
    model.eval().requires_grad_(False).to(device)
    convert_weights(model, spec.precision)
    return loaded(description, lambda x_BCHW: patch_map(model, x_BCHW))


def base_encoder(weights: Path, network: Mapping[str, Any]) -> State:
    """The tensors of the base encoder, projection head included, without their prefix.

    Raises UserError for a file of another kind (momentum encoder, linear probe, stripped keys) or architecture.
    """
    checkpoint = read_checkpoint(weights)
    arch = checkpoint.get("arch")
    if isinstance(arch, str) and arch != network["arch"]:
        raise UserError(
            f"The weights {weights} are of MoCo-v3's {arch}, not of its {network['arch']}; name the encoder that has them."
        )
    state = tensors_of(checkpoint, weights)
    if not any(key.startswith(PREFIX) for key in state):
        raise UserError(f"The weights {weights} are not a MoCo-v3 pre-training file: {_instead(state)}.")
    own = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    return {_corrected(key): value for key, value in own.items()}


def _instead(state: State) -> str:
    if any(key.startswith("module.momentum_encoder.") for key in state):
        return f"they hold the momentum encoder only, and the features are the base encoder's ({PREFIX}*)"
    if "module.head.weight" in state and state["module.head.weight"].ndim == 2:
        return "they are of a linear probe (module.head.weight); take the file of the pre-training itself"
    first = f" (its first is '{min(state)}')" if state else ""
    return f"no key begins with {PREFIX}{first}; take the official .pth.tar as it is"


def _corrected(key: str) -> str:
    """ViT-L's file was written after a careless replacement: in blocks 13 and 14 `norm1` became `norm13`, `fc2` `fc14`..."""
    number = re.match(r"blocks\.(13|14)\.", key)
    if number is None:
        return key
    digit = {"13": "1", "14": "2"}[number[1]]
    return key.replace(f"norm{number[1]}", f"norm{digit}").replace(f"fc{number[1]}", f"fc{digit}")


def load_backbone(model: Any, backbone: State, weights: Path, network: Mapping[str, Any]) -> None:
    """Fit the tensors into the ViT, the position embedding proven first."""
    _check_position(backbone.get("pos_embed"), weights, network)
    fit(model, backbone, weights, "check that it is the encoder's own file, or what --model-args says of it")


def _check_position(found_1ND: Tensor | None, weights: Path, network: Mapping[str, Any]) -> None:
    if found_1ND is None:
        return  # a missing key is fit's to report
    expected_1ND = position_embedding(network["img_size"] // network["patch_size"], network["embed_dim"])
    if found_1ND.shape != expected_1ND.shape:
        raise UserError(
            f"The position embedding of {weights} is {tuple(found_1ND.shape)}, but {network['img_size']} px in patches of "
            f"{network['patch_size']} with {network['embed_dim']} channels need {tuple(expected_1ND.shape)}; check --model-args."
        )
    if (found_1ND - expected_1ND).abs().max() > 1e-3:
        raise UserError(
            f"The position embedding of {weights} is not MoCo-v3's fixed sine-cosine one, rows before columns; "
            "these weights were changed or are of another model."
        )


def position_embedding(side: int, width: int) -> Tensor:
    """MoCo-v3's fixed embedding (1, 1 + side^2, width): zeros for the class token, then for row i and column j
    [sin(i w), cos(i w), sin(j w), cos(j w)] with w_k = 10000^(-k / (width / 4)), k = 0 ... width / 4 - 1."""
    import torch

    quarter = width // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles_SQ = torch.arange(side, dtype=torch.float64)[:, None] * omega
    waves_SH = torch.cat([angles_SQ.sin(), angles_SQ.cos()], dim=1)
    rows = waves_SH[:, None].expand(side, side, -1)
    columns = waves_SH[None, :].expand(side, side, -1)
    patches = torch.cat([rows, columns], dim=-1).reshape(1, side * side, -1)
    return torch.cat([torch.zeros(1, 1, patches.shape[-1], dtype=torch.float64), patches], dim=1).float()


KIND = Kind(describe, build, VARIANTS)
