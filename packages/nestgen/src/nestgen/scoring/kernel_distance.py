"""The kernel distance: unbiased MMD² with KID's polynomial kernel (Binkowski et al. 2018, arXiv 1801.01401)."""

from __future__ import annotations

import numpy as np
from torch import Tensor

CHUNK = 2048  # vectors whose kernel with as many others is held at a time


def kernel_rows(x_ND: Tensor, y_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Means over y of k(x, y) = (x·y / D + 1)³, for each x (N), and for each y over x (M)."""
    rows_N, columns_M = x_ND.new_zeros(len(x_ND)), y_MD.new_zeros(len(y_MD))
    for x_BD, rows_B in zip(x_ND.split(CHUNK), rows_N.split(CHUNK)):
        for y_CD, columns_C in zip(y_MD.split(CHUNK), columns_M.split(CHUNK)):
            kernel_BC = (x_BD @ y_CD.T / x_ND.shape[1] + 1) ** 3
            rows_B += kernel_BC.sum(1)
            columns_C += kernel_BC.sum(0)
    return rows_N / len(y_MD), columns_M / len(x_ND)


def kernel_within(x_ND: Tensor) -> Tensor:
    """Mean of k(x, x') over the other vectors x', for each x (N)."""
    own = (x_ND.square().sum(1) / x_ND.shape[1] + 1) ** 3
    n = len(x_ND)
    return (kernel_rows(x_ND, x_ND)[0] * n - own) / (n - 1)


def kernel_distance(x_ND: Tensor, y_MD: Tensor, within_y_M: Tensor | None = None) -> tuple[float, float]:
    """The unbiased estimate from all vectors at once, and its standard error; float64, two vectors or more each.

    The estimate is mean k(x, x') + mean k(y, y') - 2 mean k(x, y), pairs of one vector with itself left out, so it
    may fall below 0 where the sets are alike. Published KIDs average it over random subsets; all vectors at once need
    no random choice and vary least. The error is that of the projection of this U-statistic: 4 Var(h_x) / N + 4 Var(h_y) / M,
    square root, with h_x = mean k(x, x') - mean k(x, y). `within_y_M` is `kernel_within(y_MD)`, if it is at hand.
    """
    if min(len(x_ND), len(y_MD)) < 2:
        raise ValueError(f"two sets of 2 or more vectors, not {len(x_ND)} and {len(y_MD)}")
    within_x = kernel_within(x_ND)
    within_y = kernel_within(y_MD) if within_y_M is None else within_y_M
    across_x, across_y = kernel_rows(x_ND, y_MD)
    distance = within_x.mean() + within_y.mean() - 2 * across_x.mean()
    variance = 4 * (within_x - across_x).var() / len(x_ND) + 4 * (within_y - across_y).var() / len(y_MD)
    return float(distance), float(np.sqrt(float(variance)))
