"""FAISS in its own process against a plain search, and the label agreement."""

from __future__ import annotations

import numpy as np
import pytest

from featurize.neighbours import label_agreement, nearest, without_self


def test_nearest_is_the_exact_cosine_order() -> None:
    random = np.random.default_rng(0)
    gallery, queries = random.normal(size=(200, 12)), random.normal(size=(7, 12))
    similar, found = nearest(gallery, queries, 5)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    cosine = unit(queries) @ unit(gallery).T
    np.testing.assert_array_equal(found, np.argsort(-cosine, axis=1)[:, :5])
    np.testing.assert_allclose(similar, -np.sort(-cosine, axis=1)[:, :5], atol=1e-6)


def test_more_neighbours_than_rows_gives_all_rows() -> None:
    x = np.eye(3)
    assert nearest(x, x[:1], 10)[1].shape == (1, 3)


def test_the_query_itself_is_left_out_wherever_it_stands() -> None:
    found = np.array([[4, 2, 9], [7, 1, 5]])
    np.testing.assert_array_equal(without_self(np.array([2, 7]), found, 2), [[4, 9], [1, 5]])


def test_agreement_is_the_share_of_equal_labels() -> None:
    labels = np.array([0, 0, 1, 1, -1])
    found = np.array([[1, 2], [3, 0], [0, 1]])
    assert label_agreement(labels, np.array([0, 2, 4]), found) == pytest.approx(0.5)
    assert label_agreement(np.full(5, -1), np.array([0]), found[:1]) is None
