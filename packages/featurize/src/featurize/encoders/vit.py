"""The vision transformer that MoCo-v3 and DINO have in common, built by timm. Imported only where one is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

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


def patch_map(model: VisionTransformer, x_BCHW: Tensor) -> Tensor:
    """Patch tokens f_BHWD after the last block and the final LayerNorm; class and register tokens are dropped."""
    height, width = model.patch_embed.grid_size
    tokens_BND = model.forward_features(x_BCHW)[:, model.num_prefix_tokens :]
    return tokens_BND.unflatten(1, (int(height), int(width)))
