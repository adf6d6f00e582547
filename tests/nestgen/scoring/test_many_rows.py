"""Scores of more vectors than memory holds: read block by block, the same as of all at once."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestgen.scoring import frechet, statistics
from nestgen.scoring.frechet import fit_gaussian, gaussian_distance
from nestgen.scoring.statistics import measure, some_rows, statistics_of


@dataclass(frozen=True)
class Drawn:
    """Rows that exist only as they are read: row i is a function of i."""

    count: int
    dimensions: int = 16

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: np.ndarray, /) -> np.ndarray:
        return np.sin(np.outer(rows + 1.0, np.arange(1.0, self.dimensions + 1) ** 0.5)).astype(np.float32)


@settings(deadline=None, max_examples=40)
@given(n=st.integers(2, 60), dims=st.integers(1, 20), block=st.integers(2, 25), seed=st.integers(0, 2**31))
def test_the_gaussian_is_that_of_all_rows_whatever_the_blocks(n: int, dims: int, block: int, seed: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(n, dims)) * 3 + 100
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frechet, "BLOCK", block)
        found = fit_gaussian(rows)
    np.testing.assert_allclose(found.mean_D, rows.mean(0), rtol=1e-12)
    covariance = np.atleast_2d(np.cov(rows, rowvar=False))
    np.testing.assert_allclose(found.factor_RD.T @ found.factor_RD, covariance, atol=1e-10 * (1 + covariance.max()))
    assert len(found.factor_RD) <= max(dims, block)
    assert abs(gaussian_distance(found, fit_gaussian(rows))) < 1e-9 * n * dims


def test_kernel_scores_take_some_rows_the_same_ones_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "MOST", 300)
    assert some_rows(300).tolist() == list(range(300))
    chosen = some_rows(2000)
    assert len(set(chosen.tolist())) == 300 and (np.diff(chosen) > 0).all() and chosen.max() > 1800
    assert some_rows(2000).tolist() == chosen.tolist()
    vectors = Drawn(2000)
    found = statistics_of(vectors)
    assert found.vectors_MD is not None and found.within_M is not None
    np.testing.assert_array_equal(found.vectors_MD, vectors[chosen])
    assert len(found.within_M) == 300
    everything = fit_gaussian(vectors[np.arange(2000)])
    assert gaussian_distance(found.gaussian, everything) < 1e-9
    few, all_rows = measure(vectors[np.arange(0, 2000, 2)], found), measure(vectors[np.arange(2000)], found)
    assert few["frechet_distance"] != all_rows["frechet_distance"]
    assert few["kid_error"] > 0  # type: ignore[operator]


def test_memory_does_not_grow_with_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "MOST", 500)
    monkeypatch.setattr(frechet, "BLOCK", 256)

    def peak(count: int) -> int:
        tracemalloc.start()
        statistics_of(Drawn(count))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(1000)  # imports
    small, large = peak(2000), peak(40_000)
    assert large - small < 40_000 * 8 * 2  # the numbers of the rows, from which some are chosen
    assert large < 40_000 * 16 * 4 / 2  # the rows themselves
