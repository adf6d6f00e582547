"""The SVD basis: exact float64 moments, merged in a fixed order, then an eigendecomposition."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import scipy.linalg
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from featurize.errors import UserError
from featurize.files import replacing


@dataclass(frozen=True)
class Moments:
    """Count, mean (D) and centred scatter matrix (D, D), all float64."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray


@dataclass(frozen=True)
class Basis:
    """Principal directions of the tokens: mean (D), components (D, D) by column, eigenvalues (D) falling; float64.

    The covariance is centred, so this is the SVD of the tokens less their mean.
    """

    mean: np.ndarray
    components: np.ndarray
    eigenvalues: np.ndarray

    @property
    def sha256(self) -> str:
        arrays = (self.mean, self.components, self.eigenvalues)
        return hashlib.sha256(b"".join(np.ascontiguousarray(array, "<f8").tobytes() for array in arrays)).hexdigest()

    @property
    def explained(self) -> np.ndarray:
        """Share of the total variance per channel."""
        return self.eigenvalues / self.eigenvalues.sum()

    def project(self, f: np.ndarray, channels: int) -> np.ndarray:
        """f (..., D) on the first `channels` directions, float32."""
        components = self.components[:, :channels].astype(np.float32)
        return (f - self.mean.astype(np.float32)) @ components


def moments_of(tokens_ND: np.ndarray) -> Moments:
    """Moments of tokens (N, D), centred before they are squared: safe where a mean is large beside its spread."""
    tokens = tokens_ND.astype(np.float64)
    mean = tokens.mean(axis=0)
    tokens -= mean
    return Moments(len(tokens), mean, tokens.T @ tokens)


def merge(first: Moments, second: Moments) -> Moments:
    """Moments of the union: Chan, Golub and LeVeque (1979), pairwise update.

    M = M_1 + M_2 + d d^T n_1 n_2 / n, with d = mean_2 - mean_1.
    """
    count = first.count + second.count
    delta = second.mean - first.mean
    mean = first.mean + delta * (second.count / count)
    scatter = first.scatter + second.scatter + np.outer(delta, delta) * (first.count * second.count / count)
    return Moments(count, mean, scatter)


def merge_all(parts: Iterable[Moments]) -> Moments:
    """Merged from the first to the last: float addition is not associative, so the order is part of the result."""
    return reduce(merge, parts)


def fit(moments: Moments) -> Basis:
    """Eigenvectors of the covariance, by falling eigenvalue; each has its largest entry positive."""
    if moments.count < 2 or not np.isfinite(moments.scatter).all():
        raise UserError(
            "The basis can't be fitted: the features hold fewer than two tokens, or NaN or infinite values."
        )
    eigenvalues, vectors = scipy.linalg.eigh(moments.scatter / (moments.count - 1))
    order = np.argsort(eigenvalues)[::-1]
    vectors = vectors[:, order]
    largest = vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])]
    return Basis(moments.mean, vectors * np.where(largest < 0, -1.0, 1.0), np.maximum(eigenvalues[order], 0.0))


def drift(basis: Basis, moments: Moments, channels: int) -> dict[str, float]:
    """How far a basis is from the best one for `moments`, for its first `channels` directions.

    The largest principal angle in degrees, and the variance lost as a share of what the best basis keeps.
    """
    best = fit(moments)
    mine, theirs = basis.components[:, :channels], best.components[:, :channels]
    angle = float(np.degrees(scipy.linalg.subspace_angles(mine, theirs).max()))
    covariance = moments.scatter / (moments.count - 1)
    kept = float(np.einsum("dk,de,ek->", mine, covariance, mine))
    return {
        "largest_angle_degrees": angle,
        "lost_variance": max(0.0, 1.0 - kept / float(best.eigenvalues[:channels].sum())),
    }


def save_moments(path: Path, moments: Moments) -> None:
    """Written whole or not at all."""
    tensors = {"count": np.array(moments.count), "mean": moments.mean, "scatter": moments.scatter}
    with replacing(path) as temporary:
        save_file(tensors, temporary)


def load_moments(path: Path) -> Moments:
    tensors = load_file(path)
    return Moments(int(tensors["count"]), tensors["mean"], tensors["scatter"])


def save_basis(path: Path, basis: Basis, owner: str) -> None:
    """Written whole or not at all; `owner` is the fingerprint of the base store that it projects."""
    tensors = {
        "mean": basis.mean,
        "components": np.ascontiguousarray(basis.components),
        "eigenvalues": basis.eigenvalues,
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"owner": owner})


def owner_of(path: Path) -> str | None:
    """The owner that a basis was saved with, None for a damaged file."""
    try:
        with safe_open(path, framework="numpy") as file:
            return (file.metadata() or {}).get("owner")
    except (OSError, SafetensorError):
        return None


def load_basis(path: Path) -> Basis:
    """Raises UserError where there is no whole basis."""
    try:
        tensors = load_file(path)
        return Basis(tensors["mean"], tensors["components"], tensors["eigenvalues"])
    except (OSError, SafetensorError, KeyError):
        raise UserError(
            f"There is no basis at {path}; it is made by `featurize extract` of the training split."
        ) from None
