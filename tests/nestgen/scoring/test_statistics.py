"""Kernel distance, precision, recall, density and coverage against published formulas and torch-fidelity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestgen.scoring import kernel_distance as kid
from nestgen.scoring import precision_recall as manifold
from nestgen.scoring.frechet import fit_gaussian, gaussian_distance, gaussian_of_moments
from nestgen.scoring.kernel_distance import kernel_distance, kernel_within
from nestgen.scoring.precision_recall import neighbour_radii, precision_recall
from nestgen.scoring.statistics import cached_statistics, measure, statistics_of


def sets(n: int, m: int, dims: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(dims, dims))
    return rng.normal(size=(n, dims)) @ mix + 0.3, rng.normal(size=(m, dims)) @ mix


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays]


def test_kernel_distance_is_torch_fidelitys_on_one_subset_of_all() -> None:
    fidelity = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = tensors(*sets(90, 90, 12))
    theirs = fidelity.kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=90, verbose=False)
    assert kernel_distance(x, y)[0] == pytest.approx(theirs[fidelity.KEY_METRIC_KID_MEAN], rel=1e-9)


def test_kernel_distance_is_the_published_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kid, "CHUNK", 7)
    x, y = sets(20, 31, 6)

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 6 + 1) ** 3)

    within_x = np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    within_y = np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    across = np.mean([k(a, b) for a in x for b in y])
    distance, _ = kernel_distance(*tensors(x, y))
    assert distance == pytest.approx(within_x + within_y - 2 * across, rel=1e-10)
    assert kernel_distance(*tensors(x, y), kernel_within(tensors(y)[0]))[0] == distance


def test_kernel_distance_is_unbiased_and_knows_its_error() -> None:
    """Over many draws its mean is the distance of many samples, and its spread the stated error."""
    rng = np.random.default_rng(1)
    draws = [kernel_distance(*tensors(rng.normal(size=(60, 4)) + 0.5, rng.normal(size=(80, 4)))) for _ in range(200)]
    distances, errors = np.array(draws).T
    # E (x·x'/d + 1)^3 in closed form for Gaussians of means a, b: with u = a·b/d, s² = (|a|² + |b|² + d) / d²
    d, a = 4, 0.25 * 4

    def mean(u: float, aa: float, bb: float) -> float:
        return (1 + u) ** 3 + 3 * (1 + u) * (aa + bb + d) / d**2 + 6 * u / d**2

    exact = mean(a / d, a, a) + mean(0, 0, 0) - 2 * mean(0, a, 0)
    assert distances.mean() == pytest.approx(exact, abs=4 * distances.std() / np.sqrt(200))
    assert errors.mean() == pytest.approx(distances.std(), rel=0.2)


def test_precision_and_recall_are_torch_fidelitys(monkeypatch: pytest.MonkeyPatch) -> None:
    fidelity = pytest.importorskip("torch_fidelity.metric_prc")
    monkeypatch.setattr(manifold, "CHUNK", 30)
    x, y = tensors(*sets(120, 100, 3, seed=2))
    theirs = fidelity.prc_features_to_metric(x, y, verbose=False)
    ours = precision_recall(x, y)
    assert 0 < theirs[fidelity.KEY_METRIC_PRECISION] < 1
    assert ours["precision"] == pytest.approx(theirs[fidelity.KEY_METRIC_PRECISION], abs=1e-7)
    assert ours["recall"] == pytest.approx(theirs[fidelity.KEY_METRIC_RECALL], abs=1e-7)
    assert precision_recall(x, y, neighbour_radii(y)) == ours


def test_density_and_coverage_are_the_published_formulas() -> None:
    """Naeem et al. 2020, equations 4 and 5, pair by pair."""
    x, y = sets(50, 40, 3, seed=3)
    distance = np.linalg.norm(x[:, None] - y[None], axis=-1)
    radius = np.sort(np.linalg.norm(y[:, None] - y[None], axis=-1), axis=1)[:, 5]
    found = precision_recall(*tensors(x, y))
    assert found["density"] == pytest.approx((distance < radius).sum() / (5 * 50))
    assert found["coverage"] == pytest.approx((distance.min(0) < radius).mean())


def test_scores_fall_with_noise_and_with_lost_classes() -> None:
    rng = np.random.default_rng(4)
    centres = 6 * rng.normal(size=(8, 10))
    real, drawn = (centres[np.arange(400) % 8] + rng.normal(size=(400, 10)) for _ in range(2))
    reference = statistics_of(real)
    noisy = [measure(drawn + amount * rng.normal(size=drawn.shape), reference) for amount in (0, 1, 3)]
    fewer = [measure(drawn[np.arange(400) % 8 < classes], reference) for classes in (8, 4, 1)]
    for series in (noisy, fewer):
        for key, sign in (("frechet_distance", 1), ("kid", 1), ("coverage", -1)):
            values = [sign * (one[key] or 0.0) for one in series]
            assert values == sorted(values) and values[0] < values[2]
    assert fewer[2]["precision"] > 0.8 > 0.3 > fewer[2]["recall"]  # type: ignore[operator]
    assert noisy[2]["precision"] < 0.5  # type: ignore[operator]


def test_distances_rise_with_blur() -> None:
    """Of pictures with the spectrum of photographs, 1 / frequency, blurred by Gaussians of more and more pixels."""
    rng = np.random.default_rng(6)
    drawn, real = rng.normal(size=(2, 400, 8, 8))
    frequency = np.fft.fftfreq(8)
    squared = frequency[:, None] ** 2 + frequency[None] ** 2
    amplitude = np.where(squared > 0, 1 / np.sqrt(np.maximum(squared, 1e-9)), 0)

    def pictures(white: np.ndarray, blur: float) -> np.ndarray:
        spectrum = np.fft.fft2(white) * amplitude * np.exp(-2 * (np.pi * blur) ** 2 * squared)
        return np.fft.ifft2(spectrum).real.reshape(len(white), -1)

    reference = statistics_of(pictures(real, 0))
    blurred = [measure(pictures(drawn, blur), reference) for blur in (0, 0.5, 1, 2)]
    for key in ("frechet_distance", "kid"):
        values = [one[key] or 0.0 for one in blurred]
        assert (np.diff(values) > 0.05 * values[-1]).all(), (key, values)


@settings(deadline=None, max_examples=25)
@given(n=st.integers(2, 30), m=st.integers(2, 30), dims=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_scores_keep_within_their_bounds(n: int, m: int, dims: int, seed: int) -> None:
    x, y = sets(n, m, dims, seed)
    found = measure(x, statistics_of(y))
    assert found["kid_error"] >= 0  # type: ignore[operator]
    if min(n, m) <= 5:
        assert found["precision"] is found["coverage"] is None
    else:
        assert all(0 <= found[key] <= 1 for key in ("precision", "recall", "coverage"))  # type: ignore[operator]
        assert 0 <= found["density"] <= m / 5  # type: ignore[operator]
    own = measure(y, statistics_of(y))
    assert abs(own["frechet_distance"]) < 1e-9 * m * (1 + np.square(y).sum())  # type: ignore[arg-type]


def test_published_moments_give_the_same_distance() -> None:
    x, y = sets(300, 200, 7)
    moments = gaussian_of_moments(y.mean(0), np.cov(y, rowvar=False))
    expected = gaussian_distance(fit_gaussian(x), fit_gaussian(y))
    assert gaussian_distance(fit_gaussian(x), moments) == pytest.approx(expected, rel=1e-9)


def test_damaged_cached_statistics_are_computed_again(tmp_path: Path) -> None:
    """Flips anywhere in the file: the same statistics, by the file or computed again."""
    vectors = np.random.default_rng(0).normal(size=(12, 3))
    computed = []

    def compute() -> np.ndarray:
        computed.append(True)
        return vectors

    def cached() -> list[np.ndarray]:
        found = cached_statistics(tmp_path, {"of": "x"}, compute, cache_vectors=True)
        assert found.vectors_MD is not None and found.within_M is not None and found.radii_KM is not None
        return [found.gaussian.mean_D, found.gaussian.factor_RD, found.vectors_MD, found.within_M, found.radii_KM]

    whole = cached()
    (file,) = tmp_path.iterdir()
    content, rng = file.read_bytes(), np.random.default_rng(1)
    for _ in range(60):
        place = int(rng.integers(len(content)))
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << int(rng.integers(8))]) + content[place + 1 :])
        for one, other in zip(whole, cached()):
            np.testing.assert_array_equal(one, other)
        file.write_bytes(content)
    assert len(computed) > 30
    before = len(computed)
    cached()
    assert len(computed) == before
