"""The denoiser: a U-ViT whose image tokens are joined by the latents of the levels above."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nestgen.denoiser.blocks import Block, PatchEmbed, sinusoids
from nestgen.denoiser.condition_path import Site
from nestgen.denoiser.cpu_linear import Linear
from nestgen.recipe.recipe import Recipe

# size: (D, depth, heads). The first two are for CPUs, the others U-ViT's.
SIZES = {
    "nano": (128, 4, 4),
    "micro": (256, 8, 8),
    "small": (512, 12, 8),
    "medium": (768, 16, 12),
    "large": (1024, 20, 16),
}
SIGMA_SCALE = 100.0  # sigmas of 0..1.5 are told as 0..150, where sinusoids tell them apart


@dataclass(frozen=True)
class DenoiserConfig:
    """Everything that decides a denoiser's modules. Shapes are (h, w, c)."""

    shape: tuple[int, int, int]
    patch: int
    dim: int
    depth: int  # without the middle block; even
    heads: int
    condition_shapes: tuple[tuple[int, int, int], ...] = ()  # of the levels that condition it, the nearest first
    labels: int = 0
    text: tuple[int, int] | None = None  # tokens of a caption and their width
    condition: Literal["replace", "residual"] = "replace"
    null_condition: Literal["zeros", "learned"] = "zeros"
    sigma_told: bool = False
    qk_norm: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """Image tokens down and across."""
        return self.shape[0] // self.patch, self.shape[1] // self.patch


def denoiser_config(recipe: Recipe, level: int) -> DenoiserConfig:
    """The configuration of a level's denoiser; the top level has no condition."""
    options = recipe.denoiser
    dim, depth, heads = SIZES[options.size]
    return DenoiserConfig(
        shape=recipe.levels[level].shape,
        patch=recipe.levels[level].patch,
        dim=dim,
        depth=depth,
        heads=heads,
        condition_shapes=tuple(recipe.levels[above].shape for above in recipe.conditions(level)),
        labels=options.labels,
        text=options.text,
        condition=options.condition,
        null_condition=options.null_condition,
        sigma_told=options.sigma_told and bool(recipe.conditions(level)),
        qk_norm=options.qk_norm,
    )


def narrow(config: DenoiserConfig) -> str | None:
    """A sentence where a patch has more values than a token: what is left of the noise cannot pass.

    The untold share 1 - D / (p p C) is a floor of the loss of the noise, and stays in samples. Measured on photos
    (64x64x3, patch 8, nano): loss 0.35 and pure noise drawn, where 1 - 128 / 192 is 0.33.
    """
    values = config.patch**2 * config.shape[2]
    if values <= config.dim:
        return None
    return (
        f"a patch of {config.patch}x{config.patch}x{config.shape[2]} has {values} values and the denoiser's width is "
        f"{config.dim}: {1 - config.dim / values:.0%} of the noise cannot pass, so that the loss stays above that and "
        "samples keep it; set a smaller patch or a wider denoiser.size"
    )


class Denoiser(nn.Module):
    """What the process predicts (the noise, by default) of one level. Weights are named as in U-ViT; `sites` is added.

    Tokens are [label, time, text, image]. The conditions join the image tokens before encoder blocks 0, 2, ...,
    before the middle block, before decoder blocks 0, 2, ... and after the last.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        _, _, channels = config.shape
        dim, half = config.dim, config.depth // 2
        self.extras = 1 + bool(config.labels) + (config.text[0] if config.text else 0)
        self.checkpointing = False  # whether the backward pass computes a block's activations anew

        self.patch_embed = PatchEmbed(channels, config.patch, dim)
        if config.labels:
            self.label_emb = nn.Embedding(config.labels + 1, dim)
        if config.text:
            self.context_embed = Linear(config.text[1], dim)
            # The empty caption's embedding: set from the store, kept with the weights, so that sampling needs no store.
            self.null_context: Tensor
            self.register_buffer("null_context", torch.zeros(config.text))
        if config.sigma_told:
            self.sigma_embed = Linear(len(config.condition_shapes) * dim, dim)
        self.pos_embed = nn.Parameter(torch.empty(1, self.extras + math.prod(config.grid), dim))

        def block(skip: bool = False) -> Block:
            return Block(dim, config.heads, skip, config.qk_norm)

        self.in_blocks = nn.ModuleList(block() for _ in range(half))
        self.mid_block = block()
        self.out_blocks = nn.ModuleList(block(skip=True) for _ in range(half))
        self.norm = nn.LayerNorm(dim)
        self.decoder_pred = Linear(dim, config.patch**2 * channels)
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1)
        if config.condition_shapes:
            sites = 2 * len(range(0, half, 2)) + 2
            self.sites = nn.ModuleList(
                Site(config.condition_shapes, config.grid, dim, config.condition) for _ in range(sites)
            )
            if config.null_condition == "learned":
                nearest, *further = (nn.Parameter(torch.empty(c, h, w)) for h, w, c in config.condition_shapes)
                self.null_condition = nearest
                self.null_further = nn.ParameterList(further)
        self._initialise()

    def _initialise(self) -> None:
        """U-ViT's (linear weights and positions truncated normal of 0.02, biases 0), but for the way through.

        The noise to predict is most of what the network is given. So patches are embedded by an orthogonal matrix and
        read out by its transpose, long skips begin as the mean of both branches and the last convolution as the
        identity: the untrained network returns its input instead of having to learn that first. Measured on scenes
        (32x32x3, patch 4, nano, batch 64): loss 0.19 after 30 steps; with U-ViT's own start 0.36 after 160.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self._initialise_way_through()
        for name, parameter in self.named_parameters():
            if name.startswith("null_"):
                nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, Site):
                module.start_as_identity()
        if self.config.sigma_told:  # nothing at first, as the condition path
            nn.init.zeros_(self.sigma_embed.weight)

    @torch.no_grad()
    def _initialise_way_through(self) -> None:
        """The last LayerNorm would leave of a patch its direction and take its amplitude, all the more the fewer values
        it has. So every token gets a constant beside its patch, at right angles to all patches and as long as one of
        noise: what is then divided by varies half as much. The read-out's factor makes up for what it is on average.
        Measured on Gaussian data (2x2x3, patch 1, nano, batch 64): 1.24 times the least loss at the first step, not 14.
        """
        embed_DCpq = self.patch_embed.proj.weight
        dim, values = len(embed_DCpq), embed_DCpq[0].numel()
        nn.init.orthogonal_(embed_DCpq.view(dim, -1))
        self.decoder_pred.weight.copy_(embed_DCpq.permute(2, 3, 1, 0).flatten(0, 2))
        bias_D = self.patch_embed.proj.bias
        assert bias_D is not None
        nn.init.zeros_(bias_D)
        if values < dim:
            constant_D = torch.randn(dim)
            embed_DP = embed_DCpq.view(dim, -1)
            constant_D -= embed_DP @ (embed_DP.T @ constant_D)
            bias_D.copy_(constant_D * values**0.5 / constant_D.norm())
            self.decoder_pred.weight.mul_((2 * values / dim) ** 0.5)
        for block in self.out_blocks:
            mean = torch.eye(self.config.dim).repeat(1, 2) / 2
            block.skip_linear.weight.add_(mean)  # type: ignore[operator, union-attr]
        nn.init.dirac_(self.final_layer.weight)
        nn.init.zeros_(self.final_layer.bias)  # type: ignore[arg-type]

    def forward(
        self,
        z_BCHW: Tensor,
        time_B: Tensor,
        condition: Tensor | Sequence[Tensor] | None = None,
        keep_B: Tensor | None = None,
        label_B: Tensor | None = None,
        context_BTD: Tensor | None = None,
        sigma_BK: Tensor | None = None,
    ) -> Tensor:
        """What the process predicts of z_BCHW, (B, C, H, W).

        time_B is what the process tells the network. `condition` is the noised latent of the level above, or those of
        all levels that condition this one, the nearest first (None: the null condition for all samples), kept where
        keep_B is true. label_B is int64, where `labels` is the null class; context_BTD the embedded captions (None:
        the empty caption). sigma_BK are the noises on the conditions, for a denoiser that is told them.
        """
        conditions = self._conditions(condition, keep_B, z_BCHW)
        x_BLD = self._tokens(z_BCHW, time_B, label_B, context_BTD)
        if self.config.sigma_told:
            x_BLD = self._tell_sigma(x_BLD, None if condition is None else sigma_BK, keep_B)
        sites = iter(getattr(self, "sites", ()))

        def join(x_BLD: Tensor) -> Tensor:
            if not conditions:
                return x_BLD
            extras_BED, image_BLD = x_BLD[:, : self.extras], x_BLD[:, self.extras :]
            return torch.cat([extras_BED, self._run(next(sites), image_BLD, conditions)], 1)

        skips = []
        for i, block in enumerate(self.in_blocks):
            x_BLD = self._run(block, join(x_BLD) if i % 2 == 0 else x_BLD)
            skips.append(x_BLD)
        x_BLD = self._run(self.mid_block, join(x_BLD))
        for i, block in enumerate(self.out_blocks):
            x_BLD = self._run(block, join(x_BLD) if i % 2 == 0 else x_BLD, skips.pop())
        x_BLD = join(x_BLD)[:, self.extras :]
        return self.final_layer(self._picture(self.decoder_pred(self.norm(x_BLD))))

    def _run(self, module: nn.Module, *inputs: Any) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)

    def _tokens(self, z_BCHW: Tensor, time_B: Tensor, label_B: Tensor | None, context_BTD: Tensor | None) -> Tensor:
        image_BLD = self.patch_embed(z_BCHW)
        tokens = [sinusoids(time_B, self.config.dim).to(image_BLD.dtype)[:, None], image_BLD]
        if self.config.text:
            if context_BTD is None:
                context_BTD = self.null_context.expand(len(z_BCHW), *self.config.text)
            tokens.insert(1, self.context_embed(context_BTD))
        if self.config.labels:
            if label_B is None:
                label_B = torch.full((len(z_BCHW),), self.config.labels, device=z_BCHW.device)
            tokens.insert(0, self.label_emb(label_B)[:, None])
        return torch.cat(tokens, 1) + self.pos_embed

    def _tell_sigma(self, x_BLD: Tensor, sigma_BK: Tensor | None, keep_B: Tensor | None) -> Tensor:
        """Adds a linear map of the sigmas' sinusoids to the time token; the null condition has a sigma of 0."""
        conditions, time = len(self.config.condition_shapes), int(bool(self.config.labels))
        if sigma_BK is None:
            sigma_BK = x_BLD.new_zeros(len(x_BLD), conditions)
        if keep_B is not None:
            sigma_BK = sigma_BK * keep_B[:, None]
        told_BKD = sinusoids(SIGMA_SCALE * sigma_BK.flatten(), self.config.dim).view(len(x_BLD), -1)
        token_B1D = self.sigma_embed(told_BKD.to(x_BLD.dtype))[:, None]
        return torch.cat([x_BLD[:, :time], x_BLD[:, time : time + 1] + token_B1D, x_BLD[:, time + 1 :]], 1)

    def _conditions(
        self, condition: Tensor | Sequence[Tensor] | None, keep_B: Tensor | None, z_BCHW: Tensor
    ) -> tuple[Tensor, ...]:
        """The conditions with the null in place of what is dropped; none for the top of a hierarchy."""
        shapes = self.config.condition_shapes
        if not shapes:
            return ()
        if self.config.null_condition == "learned":
            nulls = [self.null_condition, *self.null_further]
        else:
            nulls = [z_BCHW.new_zeros(c, h, w) for h, w, c in shapes]
        if condition is None:
            return tuple(null_CHW.expand(len(z_BCHW), *null_CHW.shape) for null_CHW in nulls)
        conditions = (condition,) if isinstance(condition, Tensor) else tuple(condition)
        assert len(conditions) == len(shapes), f"{len(conditions)} condition(s) for {len(shapes)} levels"
        if keep_B is None:
            return conditions
        keep_B111 = keep_B[:, None, None, None]
        return tuple(torch.where(keep_B111, one_BCHW, null_CHW) for one_BCHW, null_CHW in zip(conditions, nulls))

    def _picture(self, x_BLP: Tensor) -> Tensor:
        """Patches (B, L, p p C) to (B, C, H, W)."""
        (h, w), p = self.config.grid, self.config.patch
        x_BhwpqC = x_BLP.view(len(x_BLP), h, w, p, p, self.config.shape[2])
        return x_BhwpqC.permute(0, 5, 1, 3, 2, 4).reshape(len(x_BLP), -1, h * p, w * p)
