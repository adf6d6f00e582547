"""What U-ViT is made of. Names of the weights are those of its published checkpoints."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestgen.denoiser.cpu_linear import Linear, gelu_linear


def sinusoids(number_B: Tensor, dim: int, longest: float = 10000) -> Tensor:
    """Embedding (B, dim) of a number for each sample: cosines, then sines, of longest^(-i / (dim / 2)) number."""
    half = dim // 2
    exponents = torch.arange(half, device=number_B.device, dtype=number_B.dtype) / half
    angles_BD = number_B[:, None] * torch.exp(-math.log(longest) * exponents)
    return torch.cat([angles_BD.cos(), angles_BD.sin()], -1)


class PatchEmbed(nn.Module):
    """A token per patch: a convolution of the patch's size and stride."""

    def __init__(self, channels: int, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, L, D), row by row."""
        return self.proj(z_BCHW).permute(0, 2, 3, 1).flatten(1, 2)


def _attention(q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v."""
    if q_BHLK.device.type == "cpu" and v_BHLK.dtype == torch.bfloat16:
        # torch's bfloat16 kernel for CPUs takes three times as long as its float32 one, most of it backward.
        with torch.autocast("cpu", enabled=False):
            out_BHLK = F.scaled_dot_product_attention(q_BHLK.float(), k_BHLK.float(), v_BHLK.float())
            return out_BHLK.to(v_BHLK.dtype)  # as a layer in bfloat16 takes it where nothing casts automatically
    return F.scaled_dot_product_attention(q_BHLK.to(v_BHLK.dtype), k_BHLK.to(v_BHLK.dtype), v_BHLK)


class Attention(nn.Module):
    """Self-attention over all tokens, without qkv bias; with `qk_norm`, queries and keys of each head normalised."""

    def __init__(self, dim: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.qk_norm = qk_norm
        if qk_norm:
            self.q_norm = nn.RMSNorm(dim // heads, eps=1e-6)
            self.k_norm = nn.RMSNorm(dim // heads, eps=1e-6)
        self.proj = Linear(dim, dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        b, n, d = x_BLD.shape
        # Taken apart before heads and tokens change places, so that backward puts the three gradients together in one copy.
        qkv_BL3HK = self.qkv(x_BLD).view(b, n, 3, self.heads, d // self.heads)
        q_BHLK, k_BHLK, v_BHLK = (one_BLHK.transpose(1, 2) for one_BLHK in qkv_BL3HK.unbind(2))
        if self.qk_norm:  # in the weights' precision whatever that of the rest
            precision = self.q_norm.weight.dtype
            q_BHLK, k_BHLK = self.q_norm(q_BHLK.to(precision)), self.k_norm(k_BHLK.to(precision))
        y_BHLK = _attention(q_BHLK, k_BHLK, v_BHLK)
        return self.proj(y_BHLK.transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    """Two linear layers, four times as wide between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.fc2 = Linear(4 * dim, dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        return self.fc2(gelu_linear(self.fc1, self.act, x_BLD))


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm in its input's precision, its statistics in float32.

    CUDA's autocast takes all tokens to float32 for it and back again, which is a quarter of a step's elementwise bytes.
    """

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        weight_D, bias_D = self.weight.to(x_BLD.dtype), self.bias.to(x_BLD.dtype)
        with torch.autocast("cuda" if x_BLD.is_cuda else "cpu", enabled=False):
            return F.layer_norm(x_BLD, list(self.normalized_shape), weight_D, bias_D, self.eps)


class Block(nn.Module):
    """Pre-norm attention and MLP; with `skip`, first takes the long skip through a linear layer."""

    def __init__(self, dim: int, heads: int, skip: bool = False, qk_norm: bool = False) -> None:
        super().__init__()
        if skip:
            self.skip_linear = Linear(2 * dim, dim)
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, heads, qk_norm)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim)

    def forward(self, x_BLD: Tensor, skip_BLD: Tensor | None = None) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        if skip_BLD is not None:
            x_BLD = self.skip_linear(x_BLD, skip_BLD)
        x_BLD = x_BLD + self.attn(self.norm1(x_BLD))
        return x_BLD + self.mlp(self.norm2(x_BLD))
