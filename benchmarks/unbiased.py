"""The Fréchet distance without the bias of few samples."""

from __future__ import annotations

import itertools
import statistics

import numpy as np

from nestgen.scoring.frechet import frechet_distance

SIZES = (0.5, 0.6, 0.8, 1.0)  # of the parts that it is extrapolated from, as shares of all


def without_bias(x_ND: np.ndarray, y_MD: np.ndarray) -> float | None:
    """The Fréchet distance of infinitely many vectors; None where the smallest parts have too few of them.

    Its bias is in proportion to 1 / N: a line through the distances of parts of both sets leads to it (Chong and Forsyth
    2020, arXiv 1911.07023).
    """
    most = min(len(x_ND), len(y_MD))
    # A distance of fewer vectors than dimensions is on no such line; 500 of 512 still are within 0.4, 500 of 900 are 90 off.
    if SIZES[0] * most < 0.95 * x_ND.shape[1]:
        return None
    inverse_sizes, distances = [], []
    for size in (int(share * most) for share in SIZES):
        parts = [[rows[i : i + size] for i in range(0, len(rows) - size + 1, size)] for rows in (x_ND, y_MD)]
        inverse_sizes.append(1 / size)
        distances.append(statistics.fmean(frechet_distance(*pair) for pair in itertools.product(*parts)))
    return float(np.polyfit(inverse_sizes, distances, 1)[1])
