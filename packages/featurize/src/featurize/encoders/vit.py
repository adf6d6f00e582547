"""The vision transformer that MoCo-v3 and DINO have in common, built by timm. Imported only where one is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from featurize.errors import UserError


def build_vit(network: Mapping[str, Any], name: str, **more: Any) -> VisionTransformer:
    """A ViT with qkv biases, LayerNorm of eps 1e-6 and exact GELU, without a head."""
    try:
        model = VisionTransformer(
            img_size=network["img_size"],
            patch_size=network["patch_size"],
            embed_dim=network["embed_dim"],
            depth=network["depth"],
            num_heads=network["num_heads"],
            num_classes=0,
            qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            **more,
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"The network of {name} can't be built with {dict(network)}: {error}.") from None
    return model


def with_resampled_positions(
    state: Mapping[str, Tensor], key: str, grid: tuple[int, int], prefix_tokens: int, weights: Path
) -> dict[str, Tensor]:
    """The tensors with the position embedding `key` resampled to the grid (H, W): bicubic, antialiased, by timm's function.

    `prefix_tokens` of its rows belong to no patch. Raises UserError for weights without it, or where it is of no square grid.
    """
    if key not in state:
        raise UserError(f"The weights {weights} hold no {key} to resample; leave resample_positions out.")
    position_1ND = state[key].reshape(1, *state[key].shape[-2:])
    patches = position_1ND.shape[1] - prefix_tokens
    if patches < 1 or math.isqrt(patches) ** 2 != patches:
        raise UserError(f"The {key} of {weights} has {patches} patches, which is no square; it can't be resampled.")
    resampled_1ND = resample_abs_pos_embed(position_1ND, list(grid), num_prefix_tokens=prefix_tokens)
    return {**state, key: resampled_1ND.reshape(*state[key].shape[:-2], *resampled_1ND.shape[1:])}


def patch_map(model: VisionTransformer, x_BCHW: Tensor) -> Tensor:
    """Patch tokens f_BHWD after the last block and the final LayerNorm; class and register tokens are dropped."""
    height, width = model.patch_embed.grid_size
    tokens_BND = model.forward_features(x_BCHW)[:, model.num_prefix_tokens :]
    return tokens_BND.unflatten(1, (int(height), int(width)))
