"""The layers that bring a condition to the token grid, for the paper's shapes and for any."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestgen.denoiser.condition_path import condition_stack

# denoiser.md's table: (condition shape, token grid, D) and the parameters of each layer of its stack
TABLE = [
    ((8, 8, 64), (16, 16), 512, [(2, 2, 0)], [131_584]),
    ((6, 6, 56), (4, 4), 512, [(3, 1, 0), (3, 2, 1)], [32_320, 295_424]),
    ((4, 4, 48), (3, 3), 512, [(3, 1, 0), (3, 2, 1)], [27_712, 295_424]),
    ((2, 2, 40), (2, 2), 512, [(4, 2, 1), (3, 2, 1)], [41_024, 295_424]),
    ((6, 6, 32), (16, 16), 768, [(6, 2, 0)], None),
    ((4, 4, 24), (3, 3), 768, [(3, 1, 0), (3, 2, 1)], None),
    ((2, 2, 16), (2, 2), 768, [(4, 2, 1), (3, 2, 1)], None),
    ((6, 6, 32), (16, 16), 1024, [(6, 2, 0)], None),
]


@pytest.mark.parametrize(("shape", "grid", "dim", "layers", "parameters"), TABLE)
def test_stacks_of_the_table(
    shape: tuple[int, int, int],
    grid: tuple[int, int],
    dim: int,
    layers: list[tuple[int, int, int]],
    parameters: list[int] | None,
) -> None:
    found = condition_stack(shape, grid, dim)
    assert [(m.kernel_size[0], m.stride[0], m.padding[0]) for m in found] == layers
    assert [type(m).__name__ for m in found] == ["ConvTranspose2d", "Conv2d"][: len(layers)]
    if parameters:
        assert [sum(p.numel() for p in m.parameters()) for m in found] == parameters


SIDE = st.integers(1, 20)


@given(SIDE, SIDE, SIDE, SIDE, st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_any_pair_of_shapes_has_a_stack(h: int, w: int, rows: int, columns: int, channels: int) -> None:
    layers = condition_stack((h, w, channels), (rows, columns), 2)
    condition = torch.randn(1, channels, h, w, dtype=torch.float64, requires_grad=True)
    tokens = layers.double()(condition)
    assert tokens.shape == (1, 2, rows, columns)
    # every place of the condition is seen, and every token sees some
    (gradient,) = torch.autograd.grad(tokens.sum(), condition, retain_graph=True)
    assert (gradient.abs().sum((0, 1)) > 0).all()
    bias_free = layers(torch.zeros_like(condition))
    assert ((tokens - bias_free).abs().sum((0, 1)) > 0).all()
