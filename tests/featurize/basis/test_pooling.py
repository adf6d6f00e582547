"""Pooling as a matrix is PyTorch's adaptive average pooling."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featurize.basis.pooling import pool, pooling_matrix


@given(st.integers(1, 14), st.integers(1, 14), st.integers(0, 13), st.integers(0, 13))
@settings(deadline=None)
def test_pooling_is_pytorchs(height: int, width: int, less_h: int, less_w: int) -> None:
    h, w = max(1, height - less_h), max(1, width - less_w)
    f = np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)
    mine = pool(f, pooling_matrix(h, height), pooling_matrix(w, width))
    theirs = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(f).permute(0, 3, 1, 2), (h, w)).permute(
        0, 2, 3, 1
    )
    np.testing.assert_allclose(mine, theirs.numpy(), atol=1e-5)


@given(st.integers(1, 32), st.integers(0, 31))
def test_rows_sum_to_one(fine: int, less: int) -> None:
    np.testing.assert_allclose(pooling_matrix(max(1, fine - less), fine).sum(axis=1), 1.0)
