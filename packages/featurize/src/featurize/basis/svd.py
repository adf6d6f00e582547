"""The SVD basis: exact float64 moments, merged in a fixed order, then an eigendecomposition."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save_file

from featurize.errors import UserError
from featurize.io.files import atomic_write

if TYPE_CHECKING:
    from torch import Tensor

Tokens: TypeAlias = "np.ndarray | Tensor"

OUTLIERS = 1e-3  # share of the tokens that count as outliers: those farthest from the mean
EDGES = np.geomspace(1e-3, 1e3, 4096)  # 0.34 % from one to the next


@dataclass(frozen=True)
class Moments:
    """Count, mean (D) and centred scatter matrix (D, D), all float64; tensors while they are on a GPU."""

    count: int
    mean: Any
    scatter: Any


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

    def project(self, f: Tokens, channels: int) -> np.ndarray:
        """f (..., D) on the first `channels` directions, float32; a tensor is projected on its own device."""
        f = _tensor(f).float()
        components = f.new_tensor(self.components[:, :channels])
        return ((f - f.new_tensor(self.mean)) @ components).cpu().numpy()


@dataclass(frozen=True)
class Outliers:
    """Tokens by their distance from the mean: `counts` of the tokens, and `energy`, the sum of their squared scores on the
    first direction, in bins of EDGES (in units of the basis's standard deviation over all channels together)."""

    counts: np.ndarray
    energy: np.ndarray


def moments_of(tokens_ND: Tokens) -> Moments:
    """Moments of tokens (N, D) in float64, centred before they are squared: safe where a mean is large beside its spread.

    A tensor on a GPU stays there: a ViT-B's 32 pictures take a core 0.13 s and a GPU a millisecond.
    """
    if isinstance(tokens_ND, np.ndarray) or tokens_ND.device.type == "cpu":
        # numpy takes x^T x for the symmetric product it is (BLAS syrk): half the time of torch's general one.
        x = np.asarray(tokens_ND).astype(np.float64)
        centre = x.mean(axis=0)
        x -= centre
        return Moments(len(x), centre, x.T @ x)
    tokens = tokens_ND.double()
    mean = tokens.mean(dim=0)
    tokens = tokens - mean
    return Moments(len(tokens), mean, tokens.T @ tokens)


def outliers_of(basis: Basis, tokens_ND: Tokens) -> Outliers:
    """The tokens counted by their distance from the basis's mean."""
    tokens = _tensor(tokens_ND).double()
    tokens = tokens - tokens.new_tensor(basis.mean)
    distance = tokens.norm(dim=1).cpu().numpy() / np.sqrt(basis.eigenvalues.sum())
    score = (tokens @ tokens.new_tensor(basis.components[:, 0])).cpu().numpy()
    bins = np.searchsorted(EDGES, distance)
    size = len(EDGES) + 1
    return Outliers(np.bincount(bins, minlength=size), np.bincount(bins, score**2, minlength=size))


def add_all(parts: Iterable[Outliers]) -> Outliers:
    """Added from the first to the last."""
    return reduce(lambda a, b: Outliers(a.counts + b.counts, a.energy + b.energy), parts)


def outlier_share(outliers: Outliers, top: float = OUTLIERS) -> float:
    """Share of the first direction's variance that the `top` share of tokens, those farthest from the mean, make.

    Near `top` where no token stands out; a few tokens with huge norms, as some ViTs have, bring it towards 1. The bin that
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


def _tensor(values: Tokens) -> Tensor:
    import torch  # takes seconds, and reading a basis needs none of it

    return torch.as_tensor(values)


def merge(first: Moments, second: Moments) -> Moments:
    """Moments of the union: Chan, Golub and LeVeque (1979), pairwise update.

    M = M_1 + M_2 + d d^T n_1 n_2 / n, with d = mean_2 - mean_1.
    """
    count = first.count + second.count
    delta = second.mean - first.mean
    mean = first.mean + delta * (second.count / count)
    outer = delta[:, None] * delta
    scatter = first.scatter + second.scatter + outer * (first.count * second.count / count)
    return Moments(count, mean, scatter)


def merge_all(parts: Iterable[Moments]) -> Moments:
    """Merged from the first to the last: float addition is not associative, so the order is part of the result.

    Parts on a GPU are merged there; what comes of them is not.
    """
    merged = reduce(merge, parts)
    return merged if isinstance(merged.mean, np.ndarray) else _fetched(merged)


def _fetched(moments: Moments) -> Moments:
    return Moments(moments.count, moments.mean.cpu().numpy(), moments.scatter.cpu().numpy())


def fit(moments: Moments) -> Basis:
    """Eigenvectors of the covariance, by falling eigenvalue; each has its largest entry positive."""
    if moments.count < 2 or not np.isfinite(moments.scatter).all():
        raise UserError(
            "The basis can't be fitted: the features hold fewer than two tokens, or NaN or infinite values."
        )
    import scipy.linalg  # only here and for the drift: reading a basis needs none of it

    eigenvalues, vectors = scipy.linalg.eigh(moments.scatter / (moments.count - 1))
    order = np.argsort(eigenvalues)[::-1]
    vectors = vectors[:, order]
    largest = vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])]
    return Basis(moments.mean, vectors * np.where(largest < 0, -1.0, 1.0), np.maximum(eigenvalues[order], 0.0))


def drift(basis: Basis, moments: Moments, channels: int) -> dict[str, float]:
    """How far a basis is from the best one for `moments`, for its first `channels` directions.

    The largest principal angle in degrees, and the variance lost as a share of what the best basis keeps.
    """
    import scipy.linalg

    best = fit(moments)
    mine, theirs = basis.components[:, :channels], best.components[:, :channels]
    angle = float(np.degrees(scipy.linalg.subspace_angles(mine, theirs).max()))
    covariance = moments.scatter / (moments.count - 1)
    kept = float(np.einsum("dk,de,ek->", mine, covariance, mine))
    return {
        "largest_angle_degrees": angle,
        "lost_variance": max(0.0, 1.0 - kept / float(best.eigenvalues[:channels].sum())),
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


def save_moments(path: Path, moments: Moments, outliers: Outliers | None = None) -> None:
    """Written whole or not at all."""
    tensors = {"count": np.array(moments.count), "mean": moments.mean, "scatter": moments.scatter}
    if outliers is not None:
        tensors |= {"outlier_counts": outliers.counts, "outlier_energy": outliers.energy}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary)


def load_moments(path: Path) -> tuple[Moments, Outliers]:
    """Raises UserError where there are none, or no whole ones."""
    try:
        tensors = load(path.read_bytes())
        moments = Moments(int(tensors["count"]), tensors["mean"], tensors["scatter"])
        none = np.zeros(0)
        return moments, Outliers(tensors.get("outlier_counts", none), tensors.get("outlier_energy", none))
    except (OSError, SafetensorError, KeyError):
        raise UserError(f"The moments {path} are damaged; `featurize repair` makes them again.") from None


def save_basis(path: Path, basis: Basis, owner: str) -> None:
    """Written whole or not at all; `owner` is the fingerprint of the base store that it projects."""
    tensors = {
        "mean": basis.mean,
        "components": np.ascontiguousarray(basis.components),
        "eigenvalues": basis.eigenvalues,
    }
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={"owner": owner})


def owner_of(path: Path) -> str | None:
    """The owner that a basis was saved with, None for a damaged file."""
    try:
        data = path.read_bytes()
        load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return header.get("__metadata__", {}).get("owner")
    except (OSError, SafetensorError, ValueError):
        return None


def load_basis(path: Path) -> Basis:
    """Raises UserError where there is no whole basis."""
    try:
        tensors = load(path.read_bytes())
        return Basis(tensors["mean"], tensors["components"], tensors["eigenvalues"])
    except (OSError, SafetensorError, KeyError):
        raise UserError(
            f"There is no basis at {path}; it is made by `featurize extract` of the training split."
        ) from None
