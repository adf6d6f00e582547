"""The Fréchet distance between two sets of vectors, in float64 and without a matrix square root."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Gaussian:
    """Mean (D) and a factor F (R, D) of the covariance, F^T F, both float64."""

    mean_D: np.ndarray
    factor_RD: np.ndarray


def fit_gaussian(rows_ND: np.ndarray) -> Gaussian:
    """The Gaussian of two or more vectors, with the unbiased covariance; F has min(N, D) rows.

    Needs a float64 copy of the vectors in memory. Raises ValueError for fewer and for values that are not finite.
    """
    if rows_ND.ndim != 2 or len(rows_ND) < 2:
        raise ValueError(f"two sets of 2 or more vectors of one length, not {rows_ND.shape}")
    if not np.isfinite(rows_ND).all():
        raise ValueError("the vectors hold values that are not finite")
    rows = rows_ND.astype(np.float64)
    mean = rows.mean(axis=0)
    rows -= mean
    rows /= np.sqrt(len(rows) - 1)
    return Gaussian(mean, np.asarray(np.linalg.qr(rows, mode="r")) if len(rows) > rows.shape[1] else rows)


def gaussian_of_moments(mean_D: np.ndarray, covariance_DD: np.ndarray) -> Gaussian:
    """The Gaussian of a published mean and covariance: F = sqrt(Λ) V^T of its eigenvectors, those below 0 left out."""
    values_D, vectors_DD = np.linalg.eigh(covariance_DD.astype(np.float64))
    return Gaussian(mean_D.astype(np.float64), np.sqrt(values_D.clip(0))[:, None] * vectors_DD.T)


def gaussian_distance(x: Gaussian, y: Gaussian) -> float:
    """Squared Fréchet distance |mean_x - mean_y|² + tr S_x + tr S_y - 2 tr (S_x S_y)^(1/2) (Dowson & Landau 1982).

    With S = F^T F, tr (S_x S_y)^(1/2) is the sum of the singular values of F_x F_y^T. So no covariance is formed,
    whose near-zero eigenvalues would carry a rounding error of 1e-16 and their square roots one of 1e-8: the
    distance is exact to rounding for fewer rows than dimensions too, and 0 for a set against itself.
    """
    if x.mean_D.shape != y.mean_D.shape:
        raise ValueError(f"vectors of one length, not {len(x.mean_D)} and {len(y.mean_D)}")
    trace = np.linalg.svd(x.factor_RD @ y.factor_RD.T, compute_uv=False).sum()
    spread = np.square(x.factor_RD).sum() + np.square(y.factor_RD).sum()
    return float(np.square(x.mean_D - y.mean_D).sum() + spread - 2 * trace)


def frechet_distance(x_ND: np.ndarray, y_MD: np.ndarray) -> float:
    """`gaussian_distance` of the Gaussians of two sets of vectors."""
    return gaussian_distance(fit_gaussian(x_ND), fit_gaussian(y_MD))
