"""Parameters and GFlops of denoisers, counted from the built modules, and what the paper prints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from nestgen.denoiser.blocks import Attention
from nestgen.denoiser.condition_path import Site
from nestgen.denoiser.config import DenoiserConfig
from nestgen.denoiser.uvit import Denoiser
from nestgen.recipe.recipe import Recipe


@dataclass(frozen=True)
class Counts:
    """`parameters` leaves out the position embedding; GFlops are of one sample's forward pass.

    `gflops` follows the paper's convention. `gflops_true` adds the two attention products, and counts deconvolutions at their
    input positions, where their products are, instead of at their output positions.
    """

    parameters: int
    gflops: float
    gflops_true: float

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.parameters + other.parameters,
            self.gflops + other.gflops,
            self.gflops_true + other.gflops_true,
        )

    def __sub__(self, other: Counts) -> Counts:
        return self + Counts(-other.parameters, -other.gflops, -other.gflops_true)


def _operations(module: nn.Module, x: Tensor, y: Tensor) -> int:
    """Flops of one module by the paper's convention (denoiser.md, which fits its 22.70 at L = 1).

    2 x (multiply-adds and biases of linear layers and convolutions, at output positions; LayerNorm once an
    element, GELU twice).
    """
    if isinstance(module, nn.Linear):
        return 2 * y.numel() * (module.in_features + (module.bias is not None))
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        return 2 * y.numel() * (module.in_channels * math.prod(module.kernel_size) + 1)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return 2 * y.numel()
    if isinstance(module, nn.GELU):
        return 4 * y.numel()
    if isinstance(module, Site):  # its first layer is two products, of which the layer itself knows nothing
        return 2 * y.numel() // module.fc2.out_features * module.fc1.out_features * (module.fc1.in_features + 1)
    return 0


@lru_cache(maxsize=64)
def count(config: DenoiserConfig) -> Counts:
    """Builds a denoiser without memory (torch's meta device), runs it on one sample and counts."""
    operations = further = 0

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal operations, further
        operations += _operations(module, inputs[0], output)
        if isinstance(module, Attention):  # q k^T and its product with v
            _, tokens, dim = output.shape
            further += 2 * 2 * tokens**2 * dim
        if isinstance(module, nn.ConvTranspose2d):
            places = inputs[0].shape[2:].numel() - output.shape[2:].numel()
            further += 2 * places * module.in_channels * module.out_channels * math.prod(module.kernel_size)

    h, w, c = config.shape
    with torch.device("meta"):
        denoiser = Denoiser(config)
        for module in denoiser.modules():
            module.register_forward_hook(hook)
        denoiser(torch.empty(1, c, h, w), torch.empty(1))
    parameters = sum(p.numel() for name, p in denoiser.named_parameters() if name != "pos_embed")
    return Counts(parameters, operations / 1e9, (operations + further) / 1e9)


def training_petaflops(recipe: Recipe, counts: Counts) -> float:
    """Operations of a denoiser's training, in PFlops: of each image of each step, three times its forward pass."""
    options = recipe.training
    return 3 * counts.gflops_true * options.batch * options.steps / 1e6


def growth(before: Sequence[DenoiserConfig], after: Sequence[DenoiserConfig]) -> Counts:
    """What one more level adds to a hierarchy: its own denoiser, and the condition paths that others get for it."""
    return _total(after) - _total(before)


def _total(configs: Sequence[DenoiserConfig]) -> Counts:
    return sum(map(count, configs), Counts(0, 0.0, 0.0))


@dataclass(frozen=True)
class PublishedGrowth:
    """The paper's growth columns for a hierarchy: millions of parameters (where legible) and GFlops, per L."""

    name: str
    size: str
    shapes: tuple[tuple[int, int, int], ...]
    parameters: tuple[float | None, ...]
    gflops: tuple[float, ...]


PAPER = (
    PublishedGrowth(
        "COCO",
        "small",
        ((32, 32, 4), (8, 8, 64), (6, 6, 56), (4, 4, 48), (2, 2, 40)),
        (44.13, 58.06, 59.58, 59.51, 59.48),
        (22.70, 8.54, 1.42, 0.72, 0.71),
    ),
    PublishedGrowth(
        "ImageNet-100",
        "medium",
        ((32, 32, 4), (6, 6, 32), (4, 4, 24), (2, 2, 16)),
        (130.7, 100.1, 100.1, 100.1),
        (71.60, 30.02, 1.01, 0.59),
    ),
)
