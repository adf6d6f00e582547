"""The SVD basis: an eigendecomposition of the tokens' exact covariance, and how good it is."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featurize.basis.moments import Moments, Outliers, Tokens
from featurize.basis.tensors import load_tensors, save_tensors
from featurize.errors import UserError
from featurize.execution.tasks import one_thread

if TYPE_CHECKING:
    from torch import Tensor

OUTLIERS = 1e-3  # share of the tokens that count as outliers: those farthest from the mean
EDGES = np.geomspace(1e-3, 1e3, 4096)  # 0.34 % from one to the next


@dataclass(frozen=True)
class Basis:
    """Principal directions of the tokens: mean (D), components (D, D) by column, eigenvalues (D) falling; float64, arrays, or
    tensors where tokens are projected.

    The covariance is centred, so this is the SVD of the tokens less their mean.
    """

    mean: Any
    components: Any
    eigenvalues: Any

    @property
    def sha256(self) -> str:
        arrays = (self.mean, self.components, self.eigenvalues)
        return hashlib.sha256(b"".join(np.ascontiguousarray(array, "<f8").tobytes() for array in arrays)).hexdigest()

    @property
    def explained(self) -> np.ndarray:
        """Share of the total variance per channel."""
        return self.eigenvalues / self.eigenvalues.sum()

    def on(self, device: str) -> Basis:
        """The same with tensors on a device, so that nothing is copied to it batch by batch."""
        import torch

        arrays = (self.mean, self.components, self.eigenvalues)
        return Basis(*(torch.as_tensor(array, device=device) for array in arrays))

    def project(self, f: Tokens, channels: int) -> Tensor:
        """f (..., D) on the first `channels` directions, float32, on the device of f."""
        f = _tensor(f).float()
        return (f - _like(f, self.mean)) @ _like(f, self.components[:, :channels])


def fit(moments: Moments) -> Basis:
    """Eigenvectors of the covariance, by falling eigenvalue; each has its largest entry positive."""
    if moments.count < 2 or not np.isfinite(moments.scatter).all():
        raise UserError(
            "The basis can't be fitted: the features hold fewer than two tokens, or NaN or infinite values."
        )
    if not moments.scatter.any():
        raise UserError("The basis can't be fitted: all features are equal; check that the images show something.")
    import scipy.linalg  # only here and for the drift: reading a basis needs none of it

    with one_thread():  # as the number of threads decides the order of the sums
        eigenvalues, vectors = scipy.linalg.eigh(moments.scatter / (moments.count - 1))
    order = np.argsort(eigenvalues)[::-1]
    vectors = vectors[:, order]
    largest = vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])]
    return Basis(moments.mean, vectors * np.where(largest < 0, -1.0, 1.0), np.maximum(eigenvalues[order], 0.0))


def distances_of(basis: Basis, tokens_ND: Tokens) -> tuple[Tensor, Tensor]:
    """Of each token the distance from the basis's mean, in units of its standard deviation over all channels together, and the
    score on its first direction; float64, on the tokens' device."""
    tokens = _tensor(tokens_ND).double()
    tokens = tokens - _like(tokens, basis.mean)
    distance_N = tokens.norm(dim=1) / basis.eigenvalues.sum() ** 0.5
    return distance_N, tokens @ _like(tokens, basis.components[:, 0])


def count_outliers(distance_N: np.ndarray, score_N: np.ndarray) -> Outliers:
    """The tokens counted by their distance."""
    bins = np.searchsorted(EDGES, distance_N)
    size = len(EDGES) + 1
    return Outliers(np.bincount(bins, minlength=size), np.bincount(bins, score_N**2, minlength=size))


def outlier_share(outliers: Outliers, top: float = OUTLIERS) -> float:
    """Share of the first direction's variance that the `top` share of tokens, those farthest from the mean, make.

    Near `top` where no token stands out; a few tokens with huge norms, as some ViTs have, move it towards 1. The bin that
    the limit falls into counts in proportion.
    """
    wanted = top * outliers.counts.sum()
    beyond = np.cumsum(outliers.counts[::-1]) - outliers.counts[::-1]  # tokens farther out than each bin, from the last
    share = np.clip((wanted - beyond) / np.maximum(outliers.counts[::-1], 1), 0.0, 1.0)
    return float((share * outliers.energy[::-1]).sum() / outliers.energy.sum())


def effective_rank(variances: np.ndarray) -> float:
    """exp of the entropy of the variances' shares (Roy and Vetterli, 2007)."""
    p = variances[variances > 0] / variances.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def drift(basis: Basis, moments: Moments, channels: int) -> dict[str, float]:
    """How far a basis is from the best one for `moments`, for its first `channels` directions.

    The largest principal angle in degrees, and the variance lost as a share of what the best basis preserves.
    """
    import scipy.linalg

    best = fit(moments)
    mine, theirs = basis.components[:, :channels], best.components[:, :channels]
    with one_thread():
        angle = float(np.degrees(scipy.linalg.subspace_angles(mine, theirs).max()))
    covariance = moments.scatter / (moments.count - 1)
    preserved = float(np.einsum("dk,de,ek->", mine, covariance, mine))
    return {
        "largest_angle_degrees": angle,
        "lost_variance": max(0.0, 1.0 - preserved / float(best.eigenvalues[:channels].sum())),
    }


def quality(basis: Basis, moments: Moments, outliers: Outliers, channels: int) -> dict[str, dict[str, float]]:
    """What the seal of a base store says of its basis, measured on all tokens: how far it drifted, and of the features
    the effective rank of their whole covariance and the share of outlier tokens in the first direction's variance."""
    return {
        "basis_drift": drift(basis, moments, channels),
        "features": {
            "tokens": moments.count,
            "effective_rank": effective_rank(fit(moments).eigenvalues),
            "outlier_share": outlier_share(outliers),
        },
    }


def save_basis(path: Path, basis: Basis, owner: str) -> None:
    """Written whole or not at all; `owner` is the fingerprint of the base store that it projects."""
    tensors = {
        "mean": basis.mean,
        "components": np.ascontiguousarray(basis.components),
        "eigenvalues": basis.eigenvalues,
    }
    save_tensors(path, tensors, {"owner": owner})


def owner_of(path: Path) -> str | None:
    """The owner that a basis was saved with, None for a damaged file."""
    try:
        return load_tensors(path, ("owner",))[1].get("owner")
    except (OSError, ValueError):
        return None


def load_basis(path: Path) -> Basis:
    """Raises UserError where there is none, or a damaged one."""
    try:
        tensors, _ = load_tensors(path, ("owner",))
        return Basis(tensors["mean"], tensors["components"], tensors["eigenvalues"])
    except FileNotFoundError:
        raise UserError(
            f"There is no basis at {path}; it is made by `featurize extract` of the training split."
        ) from None
    except (OSError, KeyError, ValueError):
        raise UserError(
            f"The basis {path} is damaged; run `featurize repair` on its store root to make it again."
        ) from None


def _like(f: Tensor, values: Tokens) -> Tensor:
    """The values in the type of f, on its device."""
    return _tensor(values).to(f)


def _tensor(values: Tokens) -> Tensor:
    import torch  # takes seconds, and reading a basis needs none of it

    return torch.as_tensor(values)
