"""The Fréchet distance between two sets of vectors, in float64 and without a matrix square root."""

from __future__ import annotations

import numpy as np


def frechet_distance(x_ND: np.ndarray, y_MD: np.ndarray) -> float:
    """Squared Fréchet distance between the Gaussians fitted to two sets of vectors.

    |mean_x - mean_y|² + tr S_x + tr S_y - 2 tr (S_x S_y)^(1/2) with unbiased covariances S (Dowson & Landau
    1982).

    With S = F^T F, tr (S_x S_y)^(1/2) is the sum of the singular values of F_x F_y^T. So no covariance is formed,
    whose near-zero eigenvalues would carry a rounding error of 1e-16 and their square roots one of 1e-8: the
    distance is exact to rounding for fewer rows than dimensions too, and 0 for a set against itself.

    x_ND, y_MD: rows are vectors of the same D, at least two each. Needs float64 copies of both in memory.
    Raises ValueError for anything else and for values that are not finite.
    """
    for rows in (x_ND, y_MD):
        if rows.ndim != 2 or len(rows) < 2 or rows.shape[1] != x_ND.shape[1]:
            raise ValueError(f"two sets of 2 or more vectors of one length, not {x_ND.shape}, {y_MD.shape}")
        if not np.isfinite(rows).all():
            raise ValueError("the vectors hold values that are not finite")
    mean_x, factor_x = _mean_and_factor(x_ND)
    mean_y, factor_y = _mean_and_factor(y_MD)
    trace = np.linalg.svd(factor_x @ factor_y.T, compute_uv=False).sum()
    return float(np.square(mean_x - mean_y).sum() + np.square(factor_x).sum() + np.square(factor_y).sum() - 2 * trace)


def _mean_and_factor(rows_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D) and the smaller F (min(N, D) x D) with F^T F the unbiased covariance."""
    rows = rows_ND.astype(np.float64)
    mean = rows.mean(axis=0)
    rows -= mean
    rows /= np.sqrt(len(rows) - 1)
    return mean, np.asarray(np.linalg.qr(rows, mode="r")) if len(rows) > rows.shape[1] else rows
