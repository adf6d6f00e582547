"""The Fréchet distance against a closed form, torch-fidelity and its own axioms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestgen.scoring.frechet import frechet_distance


def rows_with(mean: np.ndarray, variance: np.ndarray, rotation: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Rows whose sample mean and sample covariance are exactly these: rotation^T diag(variance) rotation."""
    raw = np.random.default_rng(seed).normal(size=(count, len(mean)))
    raw -= raw.mean(axis=0)
    white = np.linalg.qr(raw)[0] * np.sqrt(count - 1)
    return mean + white * np.sqrt(variance) @ rotation


def test_agrees_with_the_closed_form_of_commuting_covariances() -> None:
    rng = np.random.default_rng(0)
    mean_x, mean_y = rng.normal(size=(2, 24))
    variance_x, variance_y = rng.uniform(0, 4, size=(2, 24))
    variance_x[:5] = 0  # a degenerate Gaussian is a Gaussian
    rotation = np.linalg.qr(rng.normal(size=(24, 24)))[0]
    expected = np.sum((mean_x - mean_y) ** 2) + np.sum((np.sqrt(variance_x) - np.sqrt(variance_y)) ** 2)
    distance = frechet_distance(
        rows_with(mean_x, variance_x, rotation, 100, 1), rows_with(mean_y, variance_y, rotation, 77, 2)
    )
    assert distance == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("n", "m", "dims"), [(300, 200, 16), (500, 90, 64)])
def test_agrees_with_torch_fidelity(n: int, m: int, dims: int) -> None:
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    import torch

    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, dims)) @ rng.normal(size=(dims, dims))
    y = rng.normal(size=(m, dims)) @ rng.normal(size=(dims, dims)) + 0.5
    statistics = [fidelity.fid_features_to_statistics(torch.from_numpy(rows)) for rows in (x, y)]
    theirs = fidelity.fid_statistics_to_metric(*statistics, verbose=False)[fidelity.KEY_METRIC_FID]
    assert frechet_distance(x, y) == pytest.approx(theirs, rel=1e-6)


def test_fewer_rows_than_dimensions_is_exact() -> None:
    """Vectors that only span k dimensions of D: the distance is that of the k-dimensional vectors."""
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(9, 4)), rng.normal(size=(7, 4)) * 2 + 1
    isometry = np.linalg.qr(rng.normal(size=(400, 4)))[0].T
    inner = frechet_distance(x, y)  # more rows than dimensions
    assert frechet_distance(x @ isometry, y @ isometry) == pytest.approx(inner, rel=1e-12)


@settings(deadline=None, max_examples=40)
@given(n=st.integers(2, 40), m=st.integers(2, 40), dims=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_is_zero_on_itself_symmetric_and_never_negative(n: int, m: int, dims: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, dims)) * 3, rng.normal(size=(m, dims)) + 1
    assert abs(frechet_distance(x, x)) < 1e-10 * n * dims
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-9, abs=1e-9)
    assert frechet_distance(x, y) > -1e-9


def test_rises_with_noise() -> None:
    rng = np.random.default_rng(4)
    x, noise = rng.normal(size=(400, 8)), rng.normal(size=(400, 8))
    distances = [frechet_distance(x, x + level * noise) for level in (0, 0.25, 0.5, 1.0, 2.0)]
    assert distances == sorted(distances)
    assert distances[0] < 1e-9 < distances[1]


def test_half_precision_rows_are_computed_in_float64() -> None:
    rows = (np.random.default_rng(5).normal(size=(50, 6)) * 100).astype(np.float16)
    assert frechet_distance(rows, rows + np.float16(1)) == pytest.approx(
        frechet_distance(rows.astype(np.float64), (rows + np.float16(1)).astype(np.float64)), rel=1e-12
    )


@pytest.mark.parametrize("bad", [np.zeros((1, 3)), np.zeros((4, 2)), np.zeros(3), np.full((4, 3), np.nan)])
def test_refuses_what_has_no_distance(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"vectors"):
        frechet_distance(np.random.default_rng(6).normal(size=(9, 3)), bad)
