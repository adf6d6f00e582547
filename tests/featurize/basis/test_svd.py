"""The basis against LAPACK's SVD of the whole matrix, and moments that merge in any way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from featurize.basis.moments import Outliers, merge_all, merge_outliers, moments_of
from featurize.basis.svd import (
    Basis,
    count_outliers,
    distances_of,
    drift,
    effective_rank,
    fit,
    load_basis,
    outlier_share,
    owner_of,
    save_basis,
)
from featurize.errors import UserError


def tokens(count: int, channels: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    scales = np.geomspace(5, 0.05, channels)
    return (random.normal(size=(count, channels)) * scales) @ scipy.linalg.qr(random.normal(size=(channels, channels)))[
        0
    ]


def outliers_of(basis: Basis, tokens_ND: np.ndarray) -> Outliers:
    return count_outliers(*(values_N.numpy() for values_N in distances_of(basis, tokens_ND)))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_merged_moments_are_those_of_the_whole(sizes: list[int], seed: int) -> None:
    x = np.random.default_rng(seed).normal(3.0, 2.0, size=(sum(sizes), 5))
    merged = merge_all(moments_of(part) for part in np.split(x, np.cumsum(sizes)[:-1]))
    whole = moments_of(x)
    assert merged.count == whole.count
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("offset", [0.0, 200.0])
def test_the_basis_is_lapacks_svd(offset: float) -> None:
    x = tokens(1_000_000, 16).astype(np.float32)
    x[:, 3] += offset * x[:, 3].std()  # a mean 200 times the spread, as some encoders' channels have
    basis = fit(merge_all(moments_of(part) for part in np.array_split(x, 17)))
    centred = x.astype(np.float64) - x.astype(np.float64).mean(axis=0)
    _, singular, vectors = scipy.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(basis.eigenvalues, singular**2 / (len(x) - 1), rtol=1e-8)
    for channels in (1, 4, 8, 12):
        assert scipy.linalg.subspace_angles(basis.components[:, :channels], vectors[:channels].T).max() < 1e-6


def test_projection_is_onto_centred_directions_with_a_fixed_sign() -> None:
    x = tokens(500, 6)
    basis = fit(moments_of(x))
    np.testing.assert_allclose(
        basis.project(x.astype(np.float32), 4), (x - x.mean(0)) @ basis.components[:, :4], atol=1e-4
    )
    assert (basis.components[np.abs(basis.components).argmax(axis=0), np.arange(6)] > 0).all()
    assert basis.explained.sum() == pytest.approx(1.0)


def test_drift_is_nothing_for_the_same_moments_and_shows_for_others() -> None:
    whole = moments_of(tokens(2000, 8))
    assert drift(fit(whole), whole, 4)["lost_variance"] < 1e-12
    turned = fit(moments_of(tokens(2000, 8, seed=1)))
    assert drift(turned, whole, 4)["largest_angle_degrees"] > 5
    assert 0 < drift(turned, whole, 4)["lost_variance"] < 1


def test_saved_and_loaded_whole(tmp_path: Path) -> None:
    basis = fit(moments_of(tokens(100, 5)))
    path = tmp_path / "basis.safetensors"
    save_basis(path, basis, "someone")
    assert load_basis(path).sha256 == basis.sha256
    assert owner_of(path) == "someone"
    path.write_bytes(path.read_bytes()[:100])
    assert owner_of(path) is None
    with pytest.raises(UserError, match=r"basis .* is damaged"):
        load_basis(path)


MEASURED = """
import numpy as np
from featurize.basis.moments import moments_of
from featurize.basis.svd import drift, fit
from featurize.execution.tasks import one_thread

x = np.random.default_rng(0).normal(size=(900, 400))
with one_thread():  # as in a task
    first, second = moments_of(x[:500]), moments_of(x)
basis = fit(first)
print(basis.sha256, drift(basis, second, 40))
"""


def test_the_number_of_threads_changes_no_bit() -> None:
    """Of the basis and of what is measured of it, whatever the main process is set to."""
    found = set()
    for threads in ("1", "2", "4"):
        variables = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), threads)
        done = subprocess.run(
            [sys.executable, "-c", MEASURED], env=os.environ | variables, capture_output=True, text=True, check=True
        )
        found.add(done.stdout)
    assert len(found) == 1


def test_outliers_are_those_farthest_from_the_mean() -> None:
    """Against sorting all tokens; their share is that of the tokens where none stands out, and near 1 where a few do."""
    x = tokens(50_000, 8)
    x[::2000] *= 60.0  # 25 tokens, half of the one in a thousand that count
    basis = fit(moments_of(x))
    share = outlier_share(merge_outliers(outliers_of(basis, part) for part in np.array_split(x, 7)))
    distance = np.linalg.norm(x - basis.mean, axis=1)
    score = ((x - basis.mean) @ basis.components[:, 0]) ** 2
    expected = score[np.argsort(distance)[-50:]].sum() / score.sum()
    assert share == pytest.approx(expected, abs=2e-3)
    assert share > 0.5
    even = np.random.default_rng(0).normal(size=(50_000, 8))
    basis = fit(moments_of(even))
    assert outlier_share(outliers_of(basis, even)) < 0.01


def test_effective_rank_counts_equal_directions() -> None:
    assert effective_rank(np.array([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3.0)


def test_features_that_have_no_basis_are_refused() -> None:
    x = tokens(10, 3)
    x[2, 1] = np.nan
    with pytest.raises(UserError, match="NaN"):
        fit(moments_of(x))
    with pytest.raises(UserError, match="all features are equal"):
        fit(moments_of(np.zeros((10, 3))))


def test_the_digest_sees_every_part() -> None:
    basis = fit(moments_of(tokens(50, 4)))
    assert Basis(basis.mean + 1e-9, basis.components, basis.eigenvalues).sha256 != basis.sha256
