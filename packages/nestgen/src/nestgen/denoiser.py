"""The denoiser: a U-ViT whose image tokens are joined by the latent of the level above."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestgen.condition import Site
from nestgen.recipe import Recipe

# size: (D, depth, heads). The first two are for CPUs, the others U-ViT's.
SIZES = {
    "nano": (128, 4, 4),
    "micro": (256, 8, 8),
    "small": (512, 12, 8),
    "medium": (768, 16, 12),
    "large": (1024, 20, 16),
}


@dataclass(frozen=True)
class DenoiserConfig:
    """Everything that decides a denoiser's modules. Shapes are (h, w, c)."""

    shape: tuple[int, int, int]
    patch: int
    dim: int
    depth: int  # without the middle block; even
    heads: int
    condition_shape: tuple[int, int, int] | None = None
    labels: int = 0
    condition: Literal["replace", "residual"] = "replace"
    null_condition: Literal["zeros", "learned"] = "zeros"

    @property
    def grid(self) -> tuple[int, int]:
        """Image tokens down and across."""
        return self.shape[0] // self.patch, self.shape[1] // self.patch


def denoiser_config(recipe: Recipe, level: int) -> DenoiserConfig:
    """The configuration of a level's denoiser; the top level has no condition."""
    dim, depth, heads = SIZES[recipe.denoiser.size]
    above = recipe.levels[level + 1].shape if level + 1 < len(recipe.levels) else None
    return DenoiserConfig(
        shape=recipe.levels[level].shape,
        patch=recipe.levels[level].patch,
        dim=dim,
        depth=depth,
        heads=heads,
        condition_shape=above,
        labels=recipe.denoiser.labels,
        condition=recipe.denoiser.condition,
        null_condition=recipe.denoiser.null_condition,
    )


def time_embedding(time_B: Tensor, dim: int) -> Tensor:
    """Sinusoids (B, dim) of what the network is told: cosines, then sines, of 10000^(-i / (dim / 2)) time."""
    half = dim // 2
    exponents = torch.arange(half, device=time_B.device, dtype=time_B.dtype) / half
    angles_BD = time_B[:, None] * torch.exp(-math.log(10000) * exponents)
    return torch.cat([angles_BD.cos(), angles_BD.sin()], -1)


class PatchEmbed(nn.Module):
    """A token per patch: a convolution of the patch's size and stride."""

    def __init__(self, channels: int, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, L, D), row by row."""
        return self.proj(z_BCHW).flatten(2).transpose(1, 2)


def _attention(q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v."""
    if q_BHLK.device.type == "cpu" and q_BHLK.dtype == torch.bfloat16:
        # torch's bfloat16 kernel for CPUs takes three times as long as its float32 one, most of it backward.
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q_BHLK.float(), k_BHLK.float(), v_BHLK.float())
    return F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK)


class Attention(nn.Module):
    """Self-attention over all tokens, without qkv bias."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        b, n, d = x_BLD.shape
        q_BHLK, k_BHLK, v_BHLK = self.qkv(x_BLD).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y_BHLK = _attention(q_BHLK, k_BHLK, v_BHLK)
        return self.proj(y_BHLK.transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    """Two linear layers, four times as wide between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        return self.fc2(self.act(self.fc1(x_BLD)))


class Block(nn.Module):
    """Pre-norm attention and MLP; with `skip`, first takes the long skip through a linear layer."""

    def __init__(self, dim: int, heads: int, skip: bool = False) -> None:
        super().__init__()
        if skip:
            self.skip_linear = nn.Linear(2 * dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)

    def forward(self, x_BLD: Tensor, skip_BLD: Tensor | None = None) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        if skip_BLD is not None:
            x_BLD = self.skip_linear(torch.cat([x_BLD, skip_BLD], -1))
        x_BLD = x_BLD + self.attn(self.norm1(x_BLD))
        return x_BLD + self.mlp(self.norm2(x_BLD))


class Denoiser(nn.Module):
    """eps(z_t, t, condition, label) of one level. Names of the weights are U-ViT's; `sites` is added.

    Tokens are [label, time, image]. The condition joins the image tokens before encoder blocks 0, 2, ...,
    before the middle block, before decoder blocks 0, 2, ... and after the last.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        _, _, channels = config.shape
        dim, half = config.dim, config.depth // 2
        self.extras = 2 if config.labels else 1

        self.patch_embed = PatchEmbed(channels, config.patch, dim)
        if config.labels:
            self.label_emb = nn.Embedding(config.labels + 1, dim)
        self.pos_embed = nn.Parameter(torch.empty(1, self.extras + math.prod(config.grid), dim))
        self.in_blocks = nn.ModuleList(Block(dim, config.heads) for _ in range(half))
        self.mid_block = Block(dim, config.heads)
        self.out_blocks = nn.ModuleList(Block(dim, config.heads, skip=True) for _ in range(half))
        self.norm = nn.LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, config.patch**2 * channels)
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1)
        if config.condition_shape:
            sites = 2 * len(range(0, half, 2)) + 2
            self.sites = nn.ModuleList(
                Site(config.condition_shape, config.grid, dim, config.condition) for _ in range(sites)
            )
            if config.null_condition == "learned":
                h, w, c = config.condition_shape
                self.null_condition = nn.Parameter(torch.empty(c, h, w))
        self._initialise()

    def _initialise(self) -> None:
        """U-ViT's (linear weights and positions truncated normal of 0.02, biases 0), but for the way through.

        The noise to predict is most of what the network is given. So patches are embedded by an orthogonal matrix and
        read out by its transpose, long skips begin as the mean of both branches and the last convolution as the
        identity: the untrained network returns its input, normalised, instead of having to learn that first. Measured
        on scenes (32x32x3, patch 4, nano, batch 64): loss 0.19 after 30 steps; with U-ViT's own start 0.36 after 160.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self._initialise_way_through()
        if self.config.condition_shape and self.config.null_condition == "learned":
            nn.init.trunc_normal_(self.null_condition, std=0.02)
        for module in self.modules():
            if isinstance(module, Site):
                module.start_as_identity()

    @torch.no_grad()
    def _initialise_way_through(self) -> None:
        embed_DCpq = self.patch_embed.proj.weight
        nn.init.orthogonal_(embed_DCpq.view(len(embed_DCpq), -1))
        self.decoder_pred.weight.copy_(embed_DCpq.permute(2, 3, 1, 0).flatten(0, 2))
        for block in self.out_blocks:
            mean = torch.eye(self.config.dim).repeat(1, 2) / 2
            block.skip_linear.weight.add_(mean)  # type: ignore[operator, union-attr]
        nn.init.dirac_(self.final_layer.weight)
        nn.init.zeros_(self.final_layer.bias)  # type: ignore[arg-type]

    def forward(
        self,
        z_BCHW: Tensor,
        time_B: Tensor,
        condition_BCHW: Tensor | None = None,
        keep_B: Tensor | None = None,
        label_B: Tensor | None = None,
    ) -> Tensor:
        """The noise in z_BCHW, (B, C, H, W).

        time_B is what the process tells the network; condition_BCHW the noised latent of the level above
        (None: the null condition for all), kept where keep_B is true; label_B int64, where `labels` is the
        null class.
        """
        x_BLD = self._tokens(z_BCHW, time_B, label_B)
        condition_BCHW = self._condition(condition_BCHW, keep_B, z_BCHW)
        sites = iter(getattr(self, "sites", ()))

        def join(x_BLD: Tensor) -> Tensor:
            if condition_BCHW is None:
                return x_BLD
            extras_BED, image_BLD = x_BLD[:, : self.extras], x_BLD[:, self.extras :]
            return torch.cat([extras_BED, next(sites)(image_BLD, condition_BCHW)], 1)

        skips = []
        for i, block in enumerate(self.in_blocks):
            x_BLD = block(join(x_BLD) if i % 2 == 0 else x_BLD)
            skips.append(x_BLD)
        x_BLD = self.mid_block(join(x_BLD))
        for i, block in enumerate(self.out_blocks):
            x_BLD = block(join(x_BLD) if i % 2 == 0 else x_BLD, skips.pop())
        x_BLD = join(x_BLD)[:, self.extras :]
        return self.final_layer(self._picture(self.decoder_pred(self.norm(x_BLD))))

    def _tokens(self, z_BCHW: Tensor, time_B: Tensor, label_B: Tensor | None) -> Tensor:
        image_BLD = self.patch_embed(z_BCHW)
        time_B1D = time_embedding(time_B, self.config.dim).to(image_BLD.dtype)[:, None]
        tokens = [time_B1D, image_BLD]
        if self.config.labels:
            if label_B is None:
                label_B = torch.full((len(z_BCHW),), self.config.labels, device=z_BCHW.device)
            tokens.insert(0, self.label_emb(label_B)[:, None])
        return torch.cat(tokens, 1) + self.pos_embed

    def _condition(self, condition_BCHW: Tensor | None, keep_B: Tensor | None, z_BCHW: Tensor) -> Tensor | None:
        """The condition with the null in place of what is dropped; None for the top of a hierarchy."""
        if not self.config.condition_shape:
            return None
        h, w, c = self.config.condition_shape
        null_CHW = self.null_condition if self.config.null_condition == "learned" else z_BCHW.new_zeros(c, h, w)
        if condition_BCHW is None:
            return null_CHW.expand(len(z_BCHW), c, h, w)
        if keep_B is None:
            return condition_BCHW
        return torch.where(keep_B[:, None, None, None], condition_BCHW, null_CHW)

    def _picture(self, x_BLP: Tensor) -> Tensor:
        """Patches (B, L, p p C) to (B, C, H, W)."""
        (h, w), p = self.config.grid, self.config.patch
        x_BhwpqC = x_BLP.view(len(x_BLP), h, w, p, p, self.config.shape[2])
        return x_BhwpqC.permute(0, 5, 1, 3, 2, 4).reshape(len(x_BLP), -1, h * p, w * p)
