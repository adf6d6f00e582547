"""A distance without bias is that of the distributions, not of the samples."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.unbiased import without_bias
from nestgen.scoring.frechet import frechet_distance


def test_a_distance_without_bias_is_that_of_the_distributions() -> None:
    rng, dimensions = np.random.default_rng(0), 64
    x_ND, y_ND = rng.standard_normal((2, 1000, dimensions))
    shifted_ND = 1.5 * y_ND + 0.25  # |mean|² + tr (1 + 1.5² - 2 · 1.5) of each dimension
    expected = dimensions * (0.25**2 + 0.5**2)
    assert frechet_distance(x_ND, shifted_ND) > expected + 1
    assert without_bias(x_ND, shifted_ND) == pytest.approx(expected, abs=0.5)
    assert without_bias(x_ND, y_ND) == pytest.approx(0, abs=0.2)
    assert without_bias(x_ND[: 3 * dimensions // 2], y_ND) is None  # its halves have less than full rank
