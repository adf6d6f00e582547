"""The Fréchet distance between two sets of vectors, in float64 and without a matrix square root."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

BLOCK = 4096  # vectors in memory at a time, in float64


class Vectors(Protocol):
    """Vectors that are read as they are wanted: an array (N, D), or rows of a store."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: np.ndarray, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Gaussian:
    """Mean (D) and a factor F (R, D) of the covariance, F^T F, both float64."""

    mean_D: np.ndarray
    factor_RD: np.ndarray


def fit_gaussian(vectors: Vectors) -> Gaussian:
    """The Gaussian of two or more vectors, with the unbiased covariance; F has min(N, D) rows.

    The vectors are read once, block by block. Of n vectors with the mean m and the scatter R^T R, and k more with the mean
    m' and the centred rows C, all have the scatter R^T R + C^T C + n k / (n + k) (m' - m) (m' - m)^T (Chan et al. 1983):
    that of the triangle of a QR of the three, so that no covariance is formed here either. Raises ValueError for fewer
    than two vectors and for values that are not finite.
    """
    count, mean_D, factor_RD = 0, np.zeros(0), np.zeros((0, 0))
    for rows_ND in _blocks(vectors):
        k, block_mean_D = len(rows_ND), rows_ND.mean(axis=0)
        rows_ND -= block_mean_D
        if not count:
            count, mean_D, factor_RD = k, block_mean_D, _triangle(rows_ND)
            continue
        between_D = block_mean_D - mean_D
        factor_RD = _triangle(np.vstack([factor_RD, rows_ND, np.sqrt(count * k / (count + k)) * between_D]))
        count, mean_D = count + k, mean_D + k / (count + k) * between_D
    return Gaussian(mean_D, factor_RD / np.sqrt(count - 1))


def _blocks(vectors: Vectors) -> Iterator[np.ndarray]:
    """The vectors in float64, some thousand at a time."""
    shape = np.shape(vectors) if isinstance(vectors, np.ndarray) else (len(vectors), 0)
    if len(shape) != 2 or len(vectors) < 2:
        raise ValueError(f"two sets of 2 or more vectors of one length, not {shape}")
    for first in range(0, len(vectors), BLOCK):
        rows_ND = vectors[np.arange(first, min(first + BLOCK, len(vectors)))]
        if not np.isfinite(rows_ND).all():
            raise ValueError("the vectors hold values that are not finite")
        yield rows_ND.astype(np.float64)


def _triangle(rows_ND: np.ndarray) -> np.ndarray:
    """R (min(N, D), D) with the same R^T R as the rows."""
    return np.asarray(np.linalg.qr(rows_ND, mode="r")) if len(rows_ND) > rows_ND.shape[1] else rows_ND


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


def frechet_distance(x_ND: Vectors, y_MD: Vectors) -> float:
    """`gaussian_distance` of the Gaussians of two sets of vectors."""
    return gaussian_distance(fit_gaussian(x_ND), fit_gaussian(y_MD))
