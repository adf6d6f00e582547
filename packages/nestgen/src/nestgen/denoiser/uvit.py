"""The denoiser: a U-ViT whose image tokens are joined by the latents of the levels above."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nestgen.denoiser.blocks import Block, LayerNorm, PatchEmbed, sinusoids
from nestgen.denoiser.condition_path import Site
from nestgen.denoiser.config import DenoiserConfig, denoiser_config
from nestgen.denoiser.cpu_linear import Linear
from nestgen.denoiser.gaussian import Gaussian, Given
from nestgen.denoiser.initialisation import (
    STD,
    initialise_identity_path,
    initialise_linear_layers,
    initialise_positions,
)
from nestgen.recipe.recipe import Recipe

SIGMA_SCALE = 100.0  # sigmas of 0..1.5 are embedded as 0..150, where sinusoids differ enough


class Outputs(NamedTuple):
    """All outputs of a denoiser; None where its configuration does not have them."""

    prediction_BCHW: Tensor
    side_BCHW: Tensor | None = None  # the prediction after `early` blocks, by a head of its own
    features_BChw: Tensor | None = None  # the stored features as those blocks see them, on the grid of the tokens


class Conditioning(NamedTuple):
    """What a denoiser makes of its inputs beside z_t and the time: sampling computes it once for all steps."""

    extras_BED: (
        Tensor  # the tokens before the image's, without the time's embedding; B is 1 where all samples have the same
    )
    sites: tuple[Tensor | tuple[Tensor, ...], ...] = ()  # for each site, its `condition_part` or the noised latents
    given: Given | None = None  # what the linear part makes of the noised latents


class Denoiser(nn.Module):
    """Predicts the process's target (the noise, by default) of one level. Weights are named as in U-ViT; `sites` is added.

    Tokens are [label, time, text, image]. The conditions join the image tokens before encoder blocks 0, 2, ...,
    before the middle block, before decoder blocks 0, 2, ... and after the last.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        _, _, channels = config.shape
        dim, half = config.dim, config.depth // 2
        self.extras = 1 + bool(config.labels) + (config.text[0] if config.text else 0)
        self.checkpointing = False  # whether the backward pass recomputes a block's activations

        self.patch_embed = PatchEmbed(channels, config.patch, dim)
        if config.labels:
            self.label_emb = nn.Embedding(config.labels + 1, dim)
        if config.text:
            self.context_embed = Linear(config.text[1], dim)
            # The empty caption's embedding: copied from the store and saved with the weights: sampling needs no store.
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
        self.norm = LayerNorm(dim)
        self.decoder_pred = Linear(dim, config.patch**2 * channels)
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1)
        if config.side_head:
            self.side_norm = LayerNorm(dim)
            self.side_pred = Linear(dim, config.patch**2 * channels)
        if config.aligned:
            self.align_conv = nn.Conv2d(dim, config.aligned, 3, padding=1)
        if config.condition_shapes:
            sites = 2 * len(range(0, half, 2)) + 2
            self.sites = nn.ModuleList(
                Site(config.condition_shapes, config.grid, dim, config.condition) for _ in range(sites)
            )
            if config.null_condition == "learned":
                nearest, *further = (nn.Parameter(torch.empty(c, h, w)) for h, w, c in config.condition_shapes)
                self.null_condition = nearest
                self.null_further = nn.ParameterList(further)
        if config.gaussian:  # diffusion/linear_part.py adds it: the network does not know the process
            self.gaussian = Gaussian(config.shape, config.condition_shapes)
        self._initialise()

    def _initialise(self) -> None:
        initialise_linear_layers(self)
        nn.init.trunc_normal_(self.pos_embed, std=STD)
        if self.config.init == "identity":
            initialise_identity_path(self.patch_embed, self.out_blocks, self.decoder_pred, self.final_layer)
        if self.config.positions == "sinusoids":
            initialise_positions(self.pos_embed[0, self.extras :], self.config.grid, self.patch_embed)
        if self.config.gaussian:  # the linear part alone, at first
            nn.init.zeros_(self.decoder_pred.weight)
        if self.config.side_head:  # as the last head
            self.side_pred.load_state_dict(self.decoder_pred.state_dict())
        for name, parameter in self.named_parameters():
            if name.startswith("null_"):
                nn.init.trunc_normal_(parameter, std=STD)
        for module in self.modules():
            if isinstance(module, Site):
                module.initialise_as_identity()
        if self.config.sigma_told:  # no effect at first, as the condition path
            nn.init.zeros_(self.sigma_embed.weight)

    def forward(
        self,
        z_BCHW: Tensor,
        time_B: Tensor,
        condition: Tensor | Sequence[Tensor] | None = None,
        keep_B: Tensor | None = None,
        label_B: Tensor | None = None,
        context_BTD: Tensor | None = None,
        sigma_BK: Tensor | None = None,
        all_outputs: bool = False,
        conditioning: Conditioning | None = None,
    ) -> Tensor | Outputs:
        """The prediction for z_BCHW, (B, C, H, W); with `all_outputs`, the others as well.

        time_B is the process's `time_embedding_input`. `condition` is the noised latent of the level above, or those of
        all levels that condition this one, the nearest first; None is the null condition for all samples, and so is
        keep_B false for one. label_B is int64, `labels` being the null class. context_BTD are the embedded captions;
        None is the empty caption. sigma_BK are the noises on the conditions, for a denoiser with `sigma_told`.
        `conditioning` is what `prepare` made of all these, in their place.
        """
        if conditioning is None:
            extras_BED = self._extras(len(z_BCHW), condition, keep_B, label_B, context_BTD, sigma_BK)
            conditions = self._conditions(len(z_BCHW), condition, keep_B)
            conditioning = Conditioning(extras_BED, tuple(conditions for _ in getattr(self, "sites", ())))
        x_BLD = self._tokens(z_BCHW, time_B, conditioning.extras_BED)
        sites = zip(getattr(self, "sites", ()), conditioning.sites, strict=True)

        def apart(x_BLD: Tensor) -> tuple[Tensor, Tensor]:
            """The extra tokens, and the image's once the conditions have joined them."""
            extras_BED, image_BLD = x_BLD.split([self.extras, x_BLD.shape[1] - self.extras], 1)
            if not self.config.condition_shapes:
                return extras_BED, image_BLD
            site, conditions = next(sites)
            return extras_BED, self._run(site, image_BLD, conditions)

        def join(x_BLD: Tensor) -> Tensor:
            return torch.cat(apart(x_BLD), 1) if self.config.condition_shapes else x_BLD

        skips = []
        for i, block in enumerate(self.in_blocks):
            x_BLD = self._run(block, join(x_BLD) if i % 2 == 0 else x_BLD)
            skips.append(x_BLD)
        early_BLD = skips[self.config.early - 1][:, self.extras :]
        x_BLD = self._run(self.mid_block, join(x_BLD))
        for i, block in enumerate(self.out_blocks):
            x_BLD = self._run(block, join(x_BLD) if i % 2 == 0 else x_BLD, skips.pop())
        _, x_BLD = apart(x_BLD)
        with torch.autocast("cuda" if x_BLD.is_cuda else "cpu", enabled=False):
            x_BLD = x_BLD.to(self.norm.weight.dtype)  # the last layers are in the weights' precision
            prediction_BCHW = self.final_layer(self._unpatchify(self.decoder_pred(self.norm(x_BLD))))
        return Outputs(prediction_BCHW, *self._early_outputs(early_BLD)) if all_outputs else prediction_BCHW

    def _early_outputs(self, x_BLD: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The prediction and the features from the image tokens of the early blocks."""
        side_BCHW = features_BChw = None
        if self.config.side_head:
            side_BCHW = self._unpatchify(self.side_pred(self.side_norm(x_BLD)))
        if self.config.aligned:
            features_BChw = self.align_conv(x_BLD.transpose(1, 2).unflatten(2, self.config.grid))
        return side_BCHW, features_BChw

    def _run(self, module: nn.Module, *inputs: Any) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)

    def prepare(
        self,
        batch: int,
        condition: Tensor | Sequence[Tensor] | None = None,
        keep_B: Tensor | None = None,
        label_B: Tensor | None = None,
        context_BTD: Tensor | None = None,
        sigma_BK: Tensor | None = None,
    ) -> Conditioning:
        """All of a forward pass that depends on neither z_t nor the time, for a batch of that size."""
        conditions = self._conditions(batch, condition, keep_B)
        return Conditioning(
            self._extras(batch, condition, keep_B, label_B, context_BTD, sigma_BK),
            tuple(site.condition_part(conditions) for site in getattr(self, "sites", ())),
            self.gaussian.given(condition, keep_B) if self.config.gaussian else None,
        )

    def _tokens(self, z_BCHW: Tensor, time_B: Tensor, extras_BED: Tensor) -> Tensor:
        """All tokens (B, L, D), with their positions: in one precision from here to the last block, that of the products."""
        image_BLD = self.patch_embed(z_BCHW)
        image_BLD = image_BLD + self.pos_embed[:, self.extras :].to(image_BLD.dtype)
        extras_BED = extras_BED.to(image_BLD.dtype)
        time_B1D = sinusoids(time_B, self.config.dim).to(extras_BED.dtype)[:, None]
        time = int(bool(self.config.labels))
        before_BED, here_B1D, after_BED = extras_BED.expand(len(z_BCHW), -1, -1).tensor_split((time, time + 1), 1)
        return torch.cat([before_BED, here_B1D + time_B1D, after_BED, image_BLD], 1)

    def _extras(
        self,
        batch: int,
        condition: Tensor | Sequence[Tensor] | None,
        keep_B: Tensor | None,
        label_B: Tensor | None,
        context_BTD: Tensor | None,
        sigma_BK: Tensor | None,
    ) -> Tensor:
        """The tokens before the image's (B, E, D), with their positions; of the time's the part that no time changes."""
        if self.config.sigma_told:
            tokens = [self._sigma_token(batch, None if condition is None else sigma_BK, keep_B)]
        else:
            tokens = [self.pos_embed.new_zeros(batch, 1, self.config.dim)]
        if self.config.text:
            if context_BTD is None:
                context_BTD = self.null_context.expand(batch, *self.config.text)
            tokens.append(self.context_embed(context_BTD))
        if self.config.labels:
            if label_B is None:
                label_B = torch.full((batch,), self.config.labels, device=self.pos_embed.device)
            tokens.insert(0, self.label_emb(label_B)[:, None])
        return torch.cat(tokens, 1) + self.pos_embed[:, : self.extras]

    def _sigma_token(self, batch: int, sigma_BK: Tensor | None, keep_B: Tensor | None) -> Tensor:
        """A linear map (B, 1, D) of the sigmas' sinusoids, which joins the time token; the null condition has a sigma of 0."""
        conditions = len(self.config.condition_shapes)
        if sigma_BK is None:
            sigma_BK = self.pos_embed.new_zeros(batch, conditions)
        if keep_B is not None:
            sigma_BK = sigma_BK * keep_B[:, None]
        embedding_BKD = sinusoids(SIGMA_SCALE * sigma_BK.flatten(), self.config.dim).view(batch, -1)
        return self.sigma_embed(embedding_BKD.to(self.pos_embed.dtype))[:, None]

    def _conditions(
        self, batch: int, condition: Tensor | Sequence[Tensor] | None, keep_B: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The conditions with the null in place of what is dropped; none for the top of a hierarchy."""
        shapes = self.config.condition_shapes
        if not shapes:
            return ()
        if self.config.null_condition == "learned":
            nulls = [self.null_condition, *self.null_further]
        else:
            nulls = [self.pos_embed.new_zeros(c, h, w) for h, w, c in shapes]
        if condition is None:
            return tuple(null_CHW.expand(batch, *null_CHW.shape) for null_CHW in nulls)
        conditions = (condition,) if isinstance(condition, Tensor) else tuple(condition)
        assert len(conditions) == len(shapes), f"{len(conditions)} condition(s) for {len(shapes)} levels"
        if keep_B is None:
            return conditions
        keep_B111 = keep_B[:, None, None, None]
        return tuple(torch.where(keep_B111, one_BCHW, null_CHW) for one_BCHW, null_CHW in zip(conditions, nulls))

    def _unpatchify(self, x_BLP: Tensor) -> Tensor:
        """Patches (B, L, p p C) to (B, C, H, W), in memory as (B, H, W, C)."""
        (h, w), p = self.config.grid, self.config.patch
        x_BhwpqC = x_BLP.view(len(x_BLP), h, w, p, p, self.config.shape[2])
        return x_BhwpqC.transpose(2, 3).reshape(len(x_BLP), h * p, w * p, -1).permute(0, 3, 1, 2)


def initial_denoiser(recipe: Recipe, level: int) -> Denoiser:
    """A level's denoiser with its first weights, which depend on the recipe and the level only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed * 1000 + level)
        return Denoiser(denoiser_config(recipe, level))
