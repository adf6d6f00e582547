"""All scores of a set of vectors against a reference, whose statistics are computed once and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from nestgen.files import replacing
from nestgen.scoring.frechet import Gaussian, between, fit
from nestgen.scoring.kernel_distance import kernel_distance, kernel_within
from nestgen.scoring.precision_recall import DC, manifold_scores, radii

FORMAT = "nestgen-statistics/1"


@dataclass(frozen=True)
class Statistics:
    """What the scores need of a reference; the fields with rows are None where only its Gaussian is known."""

    gaussian: Gaussian
    vectors_MD: np.ndarray | None = None
    within_M: np.ndarray | None = None  # of kid.kernel_within
    radii_KM: np.ndarray | None = None  # of manifold.radii; None for too few vectors


def _on_device(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).to("cuda" if torch.cuda.is_available() else "cpu", torch.float64)


def statistics_of(vectors_MD: np.ndarray) -> Statistics:
    """Computes them. Raises ValueError for fewer than two vectors and for values that are not finite."""
    gaussian, vectors = fit(vectors_MD), _on_device(vectors_MD)
    within = kernel_within(vectors).cpu().numpy()
    spread = torch.stack(radii(vectors)).cpu().numpy() if len(vectors) > DC else None
    return Statistics(gaussian, vectors_MD, within, spread)


def measure(x_ND: np.ndarray, reference: Statistics) -> dict[str, float | None]:
    """The Fréchet distance, the kernel distance with its standard error, precision, recall, density and coverage.

    Raises ValueError for vectors that have none.
    """
    scores: dict[str, float | None] = {"frechet_distance": between(fit(x_ND), reference.gaussian)}
    if reference.vectors_MD is None or reference.within_M is None:
        return scores
    x, real = _on_device(x_ND), _on_device(reference.vectors_MD)
    kid, error = kernel_distance(x, real, _on_device(reference.within_M))
    spread = None if reference.radii_KM is None else tuple(_on_device(reference.radii_KM))
    return scores | {"kid": kid, "kid_error": error} | manifold_scores(x, real, spread)


def kept_statistics(
    folder: Path, what: dict[str, Any], vectors: Callable[[], np.ndarray], keep_vectors: bool = False
) -> Statistics:
    """The statistics of a reference, from FOLDER/<digest of what>.safetensors or computed and kept there.

    `what` says all that decides them. `vectors` gives the vectors, which are kept only if asked for: those of stores
    are read faster than computed.
    """
    text = json.dumps({"format": FORMAT, **what}, sort_keys=True)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
    try:
        kept = load_file(path)
    except (OSError, SafetensorError):  # not there, or cut off
        kept = {}
    if not kept:
        found = statistics_of(vectors())
        assert found.vectors_MD is not None and found.within_M is not None
        kept = {"mean": found.gaussian.mean_D, "factor": found.gaussian.factor_RD, "within": found.within_M}
        if found.radii_KM is not None:
            kept["radii"] = found.radii_KM
        if keep_vectors:
            kept["vectors"] = found.vectors_MD
        with replacing(path) as draft:
            save_file({key: np.ascontiguousarray(value) for key, value in kept.items()}, draft, {"of": text})
        return found
    rows = kept["vectors"] if keep_vectors else vectors()
    return Statistics(Gaussian(kept["mean"], kept["factor"]), rows, kept["within"], kept.get("radii"))
