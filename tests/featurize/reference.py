"""Forward passes in float64, written from the published descriptions: what the encoders are held against.

Nothing here uses timm, open_clip, diffusers or torch.nn modules. Every function takes tensors under the names of the
official files, so a wrong reading of a layout shows as a wrong number.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

State = dict[str, Tensor]


def gelu(x: Tensor) -> Tensor:
    """x Phi(x), Phi the standard normal distribution's."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def quick_gelu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-1.702 * x))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps) * weight + bias


def attention(q_BTD: Tensor, k_BTD: Tensor, v_BTD: Tensor, heads: int, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v in each head; `causal` hides what comes later."""
    batch, tokens, width = q_BTD.shape
    q, k, v = (x.reshape(batch, tokens, heads, width // heads).transpose(1, 2) for x in (q_BTD, k_BTD, v_BTD))
    scores = q @ k.transpose(-1, -2) / math.sqrt(width // heads)
    if causal:
        later = torch.arange(tokens)[:, None] < torch.arange(tokens)[None, :]
        scores = scores.masked_fill(later, float("-inf"))
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    weights = weights / weights.sum(-1, keepdim=True)
    return (weights @ v).transpose(1, 2).reshape(batch, tokens, width)


def patches(x_BCHW: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """Each patch's pixels times the kernel, row by row: (B, patches, width)."""
    batch, channels, height, width = x_BCHW.shape
    p = kernel.shape[-1]
    cut = x_BCHW.reshape(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
    tokens = cut.reshape(batch, (height // p) * (width // p), -1) @ kernel.reshape(kernel.shape[0], -1).T
    return tokens if bias is None else tokens + bias


def vit(state: State, x_BCHW: Tensor, heads: int) -> Tensor:
    """All tokens after the last block and the final norm of a ViT in MoCo-v3's, DINO's or DINOv2's layout."""
    state = {key: value.double() for key, value in state.items()}
    x = patches(x_BCHW.double(), state["patch_embed.proj.weight"], state["patch_embed.proj.bias"])
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1)
    x = x + position(state["pos_embed"], x.shape[1] - 1)
    if "register_tokens" in state:  # after the position embedding: registers have no place
        x = torch.cat([x[:, :1], state["register_tokens"].expand(len(x), -1, -1), x[:, 1:]], dim=1)
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    for number in range(depth):
        own = {k.removeprefix(f"blocks.{number}."): v for k, v in state.items() if k.startswith(f"blocks.{number}.")}
        y = layer_norm(x, own["norm1.weight"], own["norm1.bias"], 1e-6)
        q, k, v = (y @ own["attn.qkv.weight"].T + own["attn.qkv.bias"]).chunk(3, dim=-1)
        y = attention(q, k, v, heads) @ own["attn.proj.weight"].T + own["attn.proj.bias"]
        x = x + y * own.get("ls1.gamma", torch.ones(1, dtype=torch.float64))
        y = layer_norm(x, own["norm2.weight"], own["norm2.bias"], 1e-6)
        y = gelu(y @ own["mlp.fc1.weight"].T + own["mlp.fc1.bias"]) @ own["mlp.fc2.weight"].T + own["mlp.fc2.bias"]
        x = x + y * own.get("ls2.gamma", torch.ones(1, dtype=torch.float64))
    return layer_norm(x, state["norm.weight"], state["norm.bias"], 1e-6)


def position(stored_1ND: Tensor, count: int) -> Tensor:
    """The position embedding for `count` patches, by Pillow's antialiased bicubic resize where it was stored for more."""
    own, wanted = math.isqrt(stored_1ND.shape[1] - 1), math.isqrt(count)
    if own == wanted:
        return stored_1ND
    grid = stored_1ND[0, 1:].reshape(own, own, -1).numpy().astype(np.float32)
    resized = [
        np.asarray(Image.fromarray(grid[..., c]).resize((wanted, wanted), Image.Resampling.BICUBIC))
        for c in range(grid.shape[-1])
    ]
    patch_part = torch.from_numpy(np.stack(resized, axis=-1)).double().reshape(1, count, -1)
    return torch.cat([stored_1ND[:, :1], patch_part], dim=1)


def batch_norm(x_BD: Tensor, state: State, name: str) -> Tensor:
    """With the running statistics, as in evaluation."""
    x = (x_BD - state[f"{name}.running_mean"]) / torch.sqrt(state[f"{name}.running_var"] + 1e-5)
    return x * state[f"{name}.weight"] + state[f"{name}.bias"] if f"{name}.weight" in state else x


def moco_head(state: State, x_BD: Tensor) -> Tensor:
    """MoCo-v3's projection: linear, norm, ReLU, twice; then linear and a norm without scale and shift."""
    state = {key: value.double() for key, value in state.items()}
    for layer in (0, 3):
        x_BD = batch_norm(x_BD @ state[f"head.{layer}.weight"].T, state, f"head.{layer + 1}").clamp(min=0)
    return batch_norm(x_BD @ state["head.6.weight"].T, state, "head.7")


def clip_block(x: Tensor, own: State, heads: int, activation: object, causal: bool) -> Tensor:
    y = layer_norm(x, own["ln_1.weight"], own["ln_1.bias"], 1e-5)
    q, k, v = (y @ own["attn.in_proj_weight"].T + own["attn.in_proj_bias"]).chunk(3, dim=-1)
    x = x + attention(q, k, v, heads, causal) @ own["attn.out_proj.weight"].T + own["attn.out_proj.bias"]
    y = layer_norm(x, own["ln_2.weight"], own["ln_2.bias"], 1e-5)
    y = activation(y @ own["mlp.c_fc.weight"].T + own["mlp.c_fc.bias"])  # type: ignore[operator]
    return x + y @ own["mlp.c_proj.weight"].T + own["mlp.c_proj.bias"]


def _blocks(state: State, stem: str) -> list[State]:
    depth = 1 + max(int(key.removeprefix(stem).split(".")[0]) for key in state if key.startswith(stem))
    return [
        {k.removeprefix(f"{stem}{n}."): v for k, v in state.items() if k.startswith(f"{stem}{n}.")}
        for n in range(depth)
    ]


def clip_visual(state: State, x_BCHW: Tensor, heads: int, activation: object = quick_gelu, norm: bool = True) -> Tensor:
    """Patch tokens of CLIP's vision transformer, OpenAI's names; `norm` applies ln_post."""
    state = {k.removeprefix("visual."): v.double() for k, v in state.items() if k.startswith("visual.")}
    x = patches(x_BCHW.double(), state["conv1.weight"], None)
    x = torch.cat([state["class_embedding"].expand(len(x), 1, -1), x], dim=1) + state["positional_embedding"]
    x = layer_norm(x, state["ln_pre.weight"], state["ln_pre.bias"], 1e-5)
    for own in _blocks(state, "transformer.resblocks."):
        x = clip_block(x, own, heads, activation, causal=False)
    x = x[:, 1:]
    return layer_norm(x, state["ln_post.weight"], state["ln_post.bias"], 1e-5) if norm else x


def clip_text(state: State, ids_BT: Tensor, heads: int, activation: object = quick_gelu) -> Tensor:
    """The last hidden states of CLIP's text transformer after the final norm."""
    state = {k: v.double() for k, v in state.items() if not k.startswith("visual.")}
    x = state["token_embedding.weight"][ids_BT] + state["positional_embedding"]
    for own in _blocks(state, "transformer.resblocks."):
        x = clip_block(x, own, heads, activation, causal=True)
    return layer_norm(x, state["ln_final.weight"], state["ln_final.bias"], 1e-5)


def group_norm(x_BCHW: Tensor, state: State, name: str, groups: int) -> Tensor:
    batch, channels, height, width = x_BCHW.shape
    x = x_BCHW.reshape(batch, groups, -1)
    centred = x - x.mean(-1, keepdim=True)
    x = (centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)).reshape(batch, channels, height, width)
    return x * state[f"{name}.weight"].view(1, -1, 1, 1) + state[f"{name}.bias"].view(1, -1, 1, 1)


def vae_moments(state: State, x_BCHW: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """(moments, the middle block's map) of an AutoencoderKL in CompVis' layout; x in -1..1."""
    state = {key: value.double() for key, value in state.items()}

    def conv(x: Tensor, name: str, stride: int = 1, pad: int = 1) -> Tensor:
        return functional.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride=stride, padding=pad)

    def silu(x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))

    def residual(x: Tensor, name: str) -> Tensor:
        y = conv(silu(group_norm(x, state, f"{name}.norm1", groups)), f"{name}.conv1")
        y = conv(silu(group_norm(y, state, f"{name}.norm2", groups)), f"{name}.conv2")
        return y + (conv(x, f"{name}.nin_shortcut", pad=0) if f"{name}.nin_shortcut.weight" in state else x)

    def attend(x: Tensor, name: str) -> Tensor:
        batch, channels, height, width = x.shape
        y = group_norm(x, state, f"{name}.norm", groups)
        q, k, v = (conv(y, f"{name}.{part}", pad=0).flatten(2).transpose(1, 2) for part in "qkv")
        y = attention(q, k, v, heads=1).transpose(1, 2).reshape(batch, channels, height, width)
        return x + conv(y, f"{name}.proj_out", pad=0)

    x = conv(x_BCHW.double(), "encoder.conv_in")
    stages = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.down."))
    for stage in range(stages):
        block = 0
        while f"encoder.down.{stage}.block.{block}.conv1.weight" in state:
            x = residual(x, f"encoder.down.{stage}.block.{block}")
            block += 1
        if f"encoder.down.{stage}.downsample.conv.weight" in state:  # padded on the right and below only
            x = conv(functional.pad(x, (0, 1, 0, 1)), f"encoder.down.{stage}.downsample.conv", stride=2, pad=0)
    x = residual(x, "encoder.mid.block_1")
    x = attend(x, "encoder.mid.attn_1")
    middle = residual(x, "encoder.mid.block_2")
    x = conv(silu(group_norm(middle, state, "encoder.norm_out", groups)), "encoder.conv_out")
    return conv(x, "quant_conv", pad=0), middle


def furthest(found: Tensor, expected: Tensor) -> float:
    """The largest relative error of a token: |found - expected| / |expected| over its channels."""
    error = torch.linalg.vector_norm(found.double() - expected, dim=-1)
    return float((error / torch.linalg.vector_norm(expected, dim=-1)).max())


def least_cosine(found: Tensor, expected: Tensor) -> float:
    return float(functional.cosine_similarity(found.double(), expected, dim=-1).min())
