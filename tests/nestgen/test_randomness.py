"""Noise depends on (seed, stream, index) and on nothing else."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestgen import randomness

INDEX = st.lists(st.integers(0, 2**40), min_size=1, max_size=8)


@given(st.integers(0, 2**31), st.text(max_size=5), INDEX, st.permutations(range(8)))
@settings(max_examples=50, deadline=None)
def test_rows_do_not_depend_on_their_company(seed: int, stream: str, index: list[int], order: list[int]) -> None:
    for draw in (randomness.normal, randomness.uniform):
        whole = draw(seed, stream, index, (3, 2))
        chosen = [i for i in order if i < len(index)]
        assert torch.equal(whole[chosen], draw(seed, stream, [index[i] for i in chosen], (3, 2)))
        assert torch.equal(whole[-1:], draw(seed, stream, index[-1:], (3, 2)))


def test_rows_are_those_of_the_single_generator() -> None:
    rows = randomness.normal(1, "a", [5, 0, 7], (4,))
    for row, i in zip(rows, [5, 0, 7]):
        expected = randomness.generator(1, "a", i).standard_normal(4, dtype=np.float32)
        np.testing.assert_array_equal(row.numpy(), expected)


def test_seeds_streams_and_indices_differ() -> None:
    draws = [randomness.normal(*key, (100,)) for key in ((0, "a", [0]), (1, "a", [0]), (0, "b", [0]), (0, "a", [1]))]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            assert abs(torch.corrcoef(torch.cat([one, other]))[0, 1]) < 0.35


def test_moments() -> None:
    x = randomness.normal(0, "moments", range(2000), (50,)).double()
    assert abs(x.mean()) < 4 / 100_000**0.5
    assert abs(x.var() - 1) < 4 * (2 / 100_000) ** 0.5
    assert abs(torch.corrcoef(x.T) - torch.eye(50)).max() < 5 / 2000**0.5
    u = randomness.uniform(0, "moments", range(2000), (50,))
    assert u.dtype == torch.float64
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / 100_000) ** 0.5


def test_values_are_pinned() -> None:
    """A change of these numbers changes every sample and every training: it must be meant."""
    np.testing.assert_array_equal(
        randomness.normal(0, "pin", [0, 10**12], (2,)).numpy(), np.array(PINNED_NORMAL, np.float32)
    )
    np.testing.assert_array_equal(randomness.uniform(3, "pin", [7], (2,)).numpy(), np.array(PINNED_UNIFORM))


PINNED_NORMAL = [[-0.2908099591732025, 1.963891625404358], [0.4651191830635071, -0.8140348196029663]]
PINNED_UNIFORM = [[0.05122998116143185, 0.6733003224207444]]
