"""FAISS in its own process against a plain search, the inverted file's recall, agreement and overlap."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from featurize.neighbours import search, spaces
from featurize.neighbours.overlap import overlap_matrix
from featurize.neighbours.search import (
    RECALL,
    chance_agreement,
    label_agreement,
    nearest,
    search_process,
    shared_share,
    without_copies,
)
from featurize.neighbours.spaces import FileSpace, StoredSpace, encoder_spaces, image_spaces, unit
from featurize.store.read import open_sealed, read_rows
from tests.featurize.conftest import MODEL


def file_space(folder: Path, vectors: np.ndarray) -> FileSpace:
    np.save(folder / "vectors.npy", vectors.astype(np.float32))
    return FileSpace("vectors", "file", folder / "vectors.npy")


def plain_search(vectors: np.ndarray, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    cosine = unit(vectors[queries]) @ unit(vectors).T
    return -np.sort(-cosine, axis=1)[:, :count], np.argsort(-cosine, axis=1, kind="stable")[:, :count]


def test_the_exact_search_is_the_cosine_order_however_it_is_cut_into_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = np.random.default_rng(0).normal(size=(200, 12)).astype(np.float32)
    queries = np.array([3, 77, 199])
    similar, found = plain_search(vectors, queries, 5)
    space = file_space(tmp_path, vectors)
    with search_process() as search:
        apart = search(space, queries, 5)
    monkeypatch.setattr(spaces, "BLOCK_BYTES", 4 * 12 * 7)  # seven rows a block, in this process
    for near in (apart, nearest(space, queries, 5)):
        np.testing.assert_array_equal(near.positions, found)
        np.testing.assert_allclose(near.similarities, similar, atol=1e-6)
        assert str(near.index) == "exact"


def test_more_neighbours_than_rows_gives_all_rows(tmp_path: Path) -> None:
    assert nearest(file_space(tmp_path, np.eye(3)), np.array([0]), 10).positions.shape == (1, 3)


def test_the_inverted_file_finds_what_its_recall_says(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    centres = random.normal(size=(40, 24))
    vectors = centres[random.integers(40, size=3000)] + 0.5 * random.normal(size=(3000, 24))
    queries = np.arange(0, 3000, 60)
    near = nearest(file_space(tmp_path, vectors), queries, 10, "ivf")
    _, exact = plain_search(vectors.astype(np.float32), queries, 10)
    recall = shared_share(exact, near.positions)
    assert near.index.kind == "ivf"
    assert near.index.recall == pytest.approx(recall, abs=0.005)
    assert recall >= RECALL
    assert near.index.probes < near.index.lists
    np.testing.assert_array_equal(near.positions[:, 0], queries)  # re-ordered by exact similarity: itself first
    assert "recall" in str(near.index)


def test_a_level_is_compared_as_the_encoder_scales_it(extraction: Path) -> None:
    rows = np.array([2, 3, 40, 59])
    encoder = f"timm:{MODEL}"
    mean, level, _ = encoder_spaces(extraction, encoder, encoder, rows)
    stored = open_sealed(extraction / f"timm-{MODEL}" / "2x2x8.zarr")
    wanted = read_rows(stored, rows, view=0).astype(np.float32) * np.array(stored.attrs["std"], np.float32)
    assert (level.name, level.count, level.dimensions) == ("2x2x8", 4, 32)
    np.testing.assert_allclose(level.vectors(np.arange(4)), wanted.reshape(4, -1), rtol=1e-6)
    assert (mean.name, mean.dimensions) == ("mean of 4x4", 48)
    (pixels,) = image_spaces(extraction, rows)
    assert isinstance(pixels, StoredSpace) and pixels.name == "raw pixels"
    np.testing.assert_allclose(pixels.vectors(np.arange(4)).mean(axis=1), 0, atol=1e-6)


def test_the_query_and_its_copies_are_left_out_wherever_they_stand() -> None:
    found = np.array([[4, 2, 9], [7, 1, 5], [3, 8, -1]])
    alone = np.arange(10)
    np.testing.assert_array_equal(without_copies(np.array([2, 7, 8]), found, alone, 2), [[4, 9], [1, 5], [3, -1]])
    twice = np.array([0, 1, 2, 3, 2, 5, 6, 7, 8, 9])  # rows 2 and 4 are one image
    np.testing.assert_array_equal(without_copies(np.array([2, 7, 8]), found, twice, 2), [[9, -1], [1, 5], [3, -1]])


def test_chance_is_what_random_neighbours_have() -> None:
    """Against drawing every other row but copies, query by query; rows without a label are neighbours, not queries."""
    random = np.random.default_rng(0)
    labels = random.integers(-1, 3, 40)
    images = random.integers(0, 25, 40)
    shares = []
    for query in np.flatnonzero(labels >= 0):
        others = np.flatnonzero(images != images[query])
        shares.append((labels[others] == labels[query]).mean())
    assert chance_agreement(labels, images) == pytest.approx(np.mean(shares))
    ten_a_class = np.repeat(np.arange(10), 10)
    assert chance_agreement(ten_a_class, np.arange(100)) == pytest.approx(9 / 99)
    assert chance_agreement(np.full(5, -1), np.arange(5)) is None


def test_recall_is_measured_on_queries_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rows lie far apart, where every list is found; the others are hard."""
    random = np.random.default_rng(0)
    easy = 50 * np.eye(24)[np.arange(200) % 24] + random.normal(size=(200, 24))
    vectors = np.concatenate([easy, random.normal(size=(2000, 24))])
    asked: list[np.ndarray] = []
    probe = search._probe
    monkeypatch.setattr(search, "RECALL_QUERIES", 20)
    monkeypatch.setattr(search, "_probe", lambda *given: asked.append(given[3]) or probe(*given))
    nearest(file_space(tmp_path, vectors), np.arange(0, 2200, 11), 5, "ivf")
    assert len(asked[0]) == 20 and (asked[0] >= 200).mean() > 0.7


def test_agreement_is_the_share_of_equal_labels() -> None:
    labels = np.array([0, 0, 1, 1, -1])
    found = np.array([[1, 2], [3, 0], [0, 1]])
    assert label_agreement(labels, np.array([0, 2, 4]), found) == pytest.approx(0.5)
    assert label_agreement(labels, np.array([0]), np.array([[1, -1]])) == 1.0
    assert label_agreement(np.full(5, -1), np.array([0]), found[:1]) is None


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.data())
def test_overlap_is_symmetric_and_one_with_itself(queries: int, data: st.DataObject) -> None:
    def neighbours() -> np.ndarray:
        order = st.permutations(range(12)).map(lambda positions: positions[:5])
        return np.array([data.draw(order) for _ in range(queries)])

    found = {"a": neighbours(), "b": neighbours(), "c": neighbours()}
    matrix = overlap_matrix(found)
    np.testing.assert_allclose(matrix, matrix.T)
    np.testing.assert_allclose(np.diag(matrix), 1)
    common = [len(set(a) & set(b)) / 5 for a, b in zip(found["a"], found["b"])]
    assert matrix[0, 1] == pytest.approx(np.mean(common))


@settings(deadline=None, max_examples=50)
@given(arrays(np.float32, (3, 4), elements=st.floats(-1e3, 1e3, width=32)))
def test_unit_rows_have_length_one_or_stay_zero(x: np.ndarray) -> None:
    lengths = np.linalg.norm(unit(x), axis=1)
    zero = (x == 0).all(axis=1)
    np.testing.assert_allclose(lengths[zero], 0)
    np.testing.assert_allclose(lengths[np.linalg.norm(x, axis=1) > 1e-6], 1, rtol=1e-4)
