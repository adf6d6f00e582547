"""All scores of a set of vectors against a reference, whose statistics are computed once and cached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestgen import randomness
from nestgen.errors import UserError
from nestgen.scoring.frechet import Gaussian, Vectors, fit_gaussian, gaussian_distance
from nestgen.scoring.kernel_distance import kernel_distance, kernel_within
from nestgen.scoring.precision_recall import DC, neighbour_radii, precision_recall
from nestgen.tensors import load_tensors, save_tensors

FORMAT = "nestgen-statistics/1"
MOST = 50_000  # vectors in the kernel and neighbour scores, whose cost grows with the square


@dataclass(frozen=True)
class Statistics:
    """What the scores need of a reference; all but the Gaussian are None where only moments were published.

    The Gaussian is that of all vectors, the rest of MOST of them at most (`some_rows`).
    """

    gaussian: Gaussian
    vectors_MD: np.ndarray | None = None
    within_M: np.ndarray | None = None  # kernel_distance.kernel_within
    radii_KM: np.ndarray | None = None  # precision_recall.neighbour_radii; None for too few vectors


def _on_device(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).to("cuda" if torch.cuda.is_available() else "cpu", torch.float64)


def some_rows(count: int) -> np.ndarray:
    """Row numbers in order: all of `count`, or MOST random ones that depend on nothing but the count."""
    if count <= MOST:
        return np.arange(count)
    return np.sort(randomness.generator(0, "evaluate/rows", 0).permutation(count)[:MOST])


def statistics_of(vectors_ND: Vectors) -> Statistics:
    """The statistics of vectors. Raises ValueError for fewer than two vectors and for values that are not finite."""
    gaussian, vectors_MD = fit_gaussian(vectors_ND), _some(vectors_ND)
    vectors = _on_device(vectors_MD)
    within = kernel_within(vectors).cpu().numpy()
    spread = torch.stack(neighbour_radii(vectors)).cpu().numpy() if len(vectors) > DC else None
    return Statistics(gaussian, vectors_MD, within, spread)


def measure(x_ND: np.ndarray, reference: Statistics) -> dict[str, float | None]:
    """The Fréchet distance, the kernel distance with its standard error, precision, recall, density and coverage.

    Raises ValueError for vectors that have none.
    """
    scores: dict[str, float | None] = {"frechet_distance": gaussian_distance(fit_gaussian(x_ND), reference.gaussian)}
    if reference.vectors_MD is None or reference.within_M is None:
        return scores
    x, real = _on_device(_some(x_ND)), _on_device(reference.vectors_MD)
    kid, error = kernel_distance(x, real, _on_device(reference.within_M))
    spread = None if reference.radii_KM is None else tuple(_on_device(reference.radii_KM))
    return scores | {"kid": kid, "kid_error": error} | precision_recall(x, real, spread)


def _some(vectors: Vectors) -> np.ndarray:
    return vectors[some_rows(len(vectors))]


def cached_statistics(
    folder: Path, key: dict[str, Any], vectors: Callable[[], Vectors], cache_vectors: bool = False
) -> Statistics:
    """The statistics of a reference, from FOLDER/<digest of `key`>.safetensors, or computed and written there.

    `key` names all that decides them. `vectors` computes the vectors; those of the kernel scores are written only with
    `cache_vectors`: those of stores are read faster than computed.
    """
    text = json.dumps({"format": FORMAT, **key}, sort_keys=True)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
    try:
        cached = {name: tensor.numpy() for name, tensor in load_tensors(path).items()}
    except UserError:  # not there, or damaged
        cached = {}
    if cached:
        vectors_MD = cached["vectors"] if cache_vectors else _some(vectors())
        return Statistics(Gaussian(cached["mean"], cached["factor"]), vectors_MD, cached["within"], cached.get("radii"))
    computed = statistics_of(vectors())
    assert computed.vectors_MD is not None and computed.within_M is not None
    arrays = {"mean": computed.gaussian.mean_D, "factor": computed.gaussian.factor_RD, "within": computed.within_M}
    if computed.radii_KM is not None:
        arrays["radii"] = computed.radii_KM
    if cache_vectors:
        arrays["vectors"] = computed.vectors_MD
    save_tensors(path, {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}, text)
    return computed
