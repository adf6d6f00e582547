"""The configuration of a denoiser: everything that decides its modules, and how it follows from a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nestgen.recipe.recipe import Recipe

# size: (D, depth, heads). The first three are for CPUs, the others U-ViT's.
SIZES = {
    "nano": (128, 4, 4),
    "mini": (160, 6, 5),
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
    condition_shapes: tuple[tuple[int, int, int], ...] = ()  # of the levels that condition it, the nearest first
    labels: int = 0
    text: tuple[int, int] | None = None  # tokens of a caption and their width
    condition: Literal["replace", "residual"] = "replace"
    null_condition: Literal["zeros", "learned"] = "zeros"
    sigma_told: bool = False  # whether the noise on the conditions is embedded; the name stands in recipes, checkpoints
    qk_norm: bool = False
    side_head: bool = False
    aligned: int = 0  # channels of the stored features that the early blocks are aligned to
    init: Literal["identity", "uvit"] = "identity"  # of the first weights between input and output
    positions: Literal["random", "sinusoids"] = "random"  # of the first position embeddings; they are learned
    gaussian: bool = False  # whether it has a linear part, from the rows' mean and covariance (gaussian.py)

    @property
    def early(self) -> int:
        """Blocks before the side head and the alignment: about a third of all, the middle one included."""
        return max(1, round((self.depth + 1) / 3))

    @property
    def grid(self) -> tuple[int, int]:
        """Image tokens down and across."""
        return self.shape[0] // self.patch, self.shape[1] // self.patch


def denoiser_config(recipe: Recipe, level: int) -> DenoiserConfig:
    """The configuration of a level's denoiser; the top level has no condition."""
    options = recipe.denoiser
    dim, depth, heads = SIZES[recipe.levels[level].size or options.size]
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
        side_head=recipe.training.side_loss is not None,
        init=options.init,
        positions=options.positions,
        gaussian=options.gaussian,
        aligned=recipe.features.base_channels if recipe.training.align and level == 0 else 0,
    )


def bottleneck_warning(config: DenoiserConfig) -> str | None:
    """A sentence if a patch has more values than a token, so that part of the noise cannot pass; else None.

    The lost share 1 - D / (p p C) is a floor of the loss of the noise, and stays in samples. Measured on photos
    (64x64x3, patch 8, nano): loss 0.35 and samples of pure noise, where 1 - 128 / 192 is 0.33.
    """
    values = config.patch**2 * config.shape[2]
    if values <= config.dim:
        return None
    return (
        f"a patch of {config.patch}x{config.patch}x{config.shape[2]} has {values} values and the denoiser's width is "
        f"{config.dim}: {1 - config.dim / values:.0%} of the noise cannot pass, so that the loss stays above that and "
        "samples keep it; set a smaller patch or a wider denoiser.size"
    )
