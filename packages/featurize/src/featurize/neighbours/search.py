"""Nearest neighbours with FAISS, in a process of its own: FAISS and torch each load an OpenMP runtime.

Vectors are read block by block in that process; only the queries' neighbours come back.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker

import numpy as np
from tqdm import tqdm

from featurize.errors import UserError
from featurize.execution.interrupt import signals_later
from featurize.neighbours.spaces import Space, blocks, unit

EXACT_ROWS = 1_000_000  # up to so many every row is compared; beyond, an inverted file is built
RECALL = 0.95  # of the inverted file's neighbours, which decides how many lists are probed
RECALL_QUERIES = 100
CODE_DIMENSIONS = 256  # principal directions that the inverted file stores, a byte each
CANDIDATES = 4  # of the inverted file for each neighbour; their exact similarities then decide
TRAINING_BYTES = 512 << 20


@dataclass(frozen=True)
class Index:
    """How neighbours were searched. `recall` is the share of the exact search's neighbours that were found."""

    kind: str
    lists: int | None = None
    probes: int | None = None
    trained_on: int | None = None
    recall: float | None = None
    recall_queries: int | None = None

    def __str__(self) -> str:
        if self.kind == "exact":
            return "exact"
        return (
            f"IVF: {self.lists:,} lists trained on {self.trained_on:,} rows, {self.probes} probed; "
            f"recall {self.recall:.1%} against the exact search on {self.recall_queries} queries"
        )


@dataclass(frozen=True)
class Neighbours:
    """For each query (Q, K): cosine similarities and positions in the space, most alike first; -1 where too few."""

    similarities: np.ndarray
    positions: np.ndarray
    index: Index


@contextmanager
def search_process() -> Iterator[Callable[..., Neighbours]]:
    """`nearest`, carried out in one process that has FAISS and no torch; it ends with the block, at once after an error."""
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:

        def call(space: Space, queries: np.ndarray, count: int, kind: str = "auto") -> Neighbours:
            resource_tracker.ensure_running()  # now, as it would let the signals through again
            with signals_later():  # the process starts with the first task
                found = pool.submit(nearest, space, queries, count, kind)
            try:
                return found.result()
            except BrokenProcessPool:
                raise UserError(
                    f"The search in {space.name} was killed (out of memory?); compare fewer pictures with --rows."
                ) from None

        try:
            yield call
        except BaseException:
            for process in set(multiprocessing.active_children()) - others:
                process.kill()  # the pool waits for the search to end
            raise


def nearest(space: Space, queries: np.ndarray, count: int, kind: str = "auto") -> Neighbours:
    """The `count` nearest of all the space's vectors, by cosine, to those at the positions `queries`.

    `exact` compares every row; `ivf` builds FAISS's inverted file over 8-bit codes, probes as many lists as a recall of
    RECALL needs and orders what it finds by exact similarity; `auto` is exact up to EXACT_ROWS. A query is its own nearest.
    """
    kind = ("exact" if space.count <= EXACT_ROWS else "ivf") if kind == "auto" else kind
    search: Callable[..., Neighbours] = {"exact": _exact, "ivf": _inverted_file}[kind]
    return search(space, queries, min(count, space.count))


def _exact(space: Space, queries: np.ndarray, count: int) -> Neighbours:
    import faiss
    from faiss.contrib.exhaustive_search import knn_ground_truth

    vectors = unit(space.vectors(queries))
    similarities, positions = knn_ground_truth(
        vectors, _with_progress(space, blocks(space)), count, faiss.METRIC_INNER_PRODUCT
    )
    return Neighbours(similarities, positions, Index("exact"))


def _inverted_file(space: Space, queries: np.ndarray, count: int) -> Neighbours:
    """Principal directions (compared by distances, not by angles: they are centred) in an inverted file of 8-bit codes."""
    import faiss
    from faiss.contrib.exhaustive_search import knn_ground_truth

    trained_on = min(space.count, 40 * _lists(space.count), TRAINING_BYTES // (4 * space.dimensions))
    chosen = np.sort(np.random.default_rng(0).choice(space.count, trained_on, replace=False))
    training = unit(space.vectors(chosen))
    rotation = faiss.PCAMatrix(space.dimensions, min(CODE_DIMENSIONS, space.dimensions, trained_on))
    rotation.train(training)
    lists = min(_lists(space.count), max(1, trained_on // 40))
    quantizer = faiss.IndexFlatL2(rotation.d_out)
    index = faiss.IndexIVFScalarQuantizer(quantizer, rotation.d_out, lists, faiss.ScalarQuantizer.QT_8bit)
    index.train(rotation.apply(training))
    del training

    def added() -> Iterator[np.ndarray]:
        for vectors in blocks(space):
            index.add(rotation.apply(vectors))
            yield vectors

    # From anywhere: queries come in the order of rows, which is often that of classes.
    sample = np.sort(np.random.default_rng(0).choice(queries, min(len(queries), RECALL_QUERIES), replace=False))
    _, truth = knn_ground_truth(
        unit(space.vectors(sample)), _with_progress(space, added()), count, faiss.METRIC_INNER_PRODUCT
    )
    for probes in [1 << power for power in range(int(math.log2(lists)) + 1)] + [lists]:
        index.nprobe = probes
        _, positions = _probe(space, index, rotation, sample, count)
        recall = shared_share(truth, positions)
        if recall >= RECALL:
            break
    similarities, positions = _probe(space, index, rotation, queries, count)
    return Neighbours(similarities, positions, Index("ivf", lists, probes, trained_on, recall, len(sample)))


def _lists(rows: int) -> int:
    """FAISS's own advice: about 4 sqrt(N)."""
    return max(1, int(4 * math.sqrt(rows)))


def _probe(space: Space, index, rotation, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[no-untyped-def]
    """Candidates of the inverted file by their codes, put in the order of their exact cosine."""
    similarities = np.full((len(queries), count), -np.inf, dtype=np.float32)
    positions = np.full((len(queries), count), -1)
    for number, query in enumerate(queries):
        vector = unit(space.vectors(np.array([query])))
        _, candidates = index.search(rotation.apply(vector), min(CANDIDATES * count, space.count))
        candidates = np.sort(candidates[0][candidates[0] >= 0])
        cosines = unit(space.vectors(candidates)) @ vector[0]
        order = np.argsort(-cosines, kind="stable")[:count]
        similarities[number, : len(order)], positions[number, : len(order)] = cosines[order], candidates[order]
    return similarities, positions


def _with_progress(space: Space, vectors: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The blocks, with a progress line where there are many."""
    with tqdm(total=space.count, desc=f"comparing {space.name}", unit=" rows", delay=2) as progress:
        for block in vectors:
            yield block
            progress.update(len(block))


def without_copies(positions_Q: np.ndarray, neighbours_QK: np.ndarray, images_N: np.ndarray, count: int) -> np.ndarray:
    """(Q, count): the neighbours less the query itself and every other row of the same image; -1 where too few are left.

    `images_N` has one number for each image: rows whose files have the same bytes share it.
    """
    others_QK = np.full((len(positions_Q), count), -1)
    for query, (position, neighbours) in enumerate(zip(positions_Q, neighbours_QK, strict=True)):
        others = neighbours[neighbours >= 0]
        others = others[images_N[others] != images_N[position]][:count]
        others_QK[query, : len(others)] = others
    return others_QK


def label_agreement(labels_N: np.ndarray, queries: np.ndarray, neighbours_QK: np.ndarray) -> float | None:
    """Mean share of the neighbours that have the query's label; None without labels.

    A query itself must not be among its neighbours. Queries without a label (-1) don't count.
    """
    labelled = labels_N[queries] >= 0
    if not labelled.any():
        return None
    same = (labels_N[neighbours_QK] == labels_N[queries][:, None]) & (neighbours_QK >= 0)
    return float((same.sum(axis=1) / np.maximum((neighbours_QK >= 0).sum(axis=1), 1))[labelled].mean())


def chance_agreement(labels_N: np.ndarray, images_N: np.ndarray) -> float | None:
    """The label agreement that neighbours drawn at random would have, from all rows but the query's own image.

    For a query of a class with n of N rows, whose image is in m rows, s of them with its label: (n - s) / (N - m). The mean
    over all labelled rows; None without labels.
    """
    labelled = labels_N >= 0
    rows_of_class = _sizes_of_groups(labels_N)
    rows_of_image = _sizes_of_groups(images_N)
    rows_of_both = _sizes_of_groups(np.stack([images_N, labels_N]))
    usable = labelled & (rows_of_image < len(labels_N))
    if not usable.any():
        return None
    return float(((rows_of_class - rows_of_both)[usable] / (len(labels_N) - rows_of_image[usable])).mean())


def _sizes_of_groups(values: np.ndarray) -> np.ndarray:
    """For each value along the last axis, how often it is there."""
    _, group, sizes = np.unique(values, axis=-1, return_inverse=True, return_counts=True)
    return sizes[group.ravel()]


def shared_share(first_QK: np.ndarray, second_QK: np.ndarray) -> float:
    """Mean share of the neighbours of one search that the other found as well."""
    shares = [
        len(np.intersect1d(first[first >= 0], second)) / max(1, int((first >= 0).sum()))
        for first, second in zip(first_QK, second_QK, strict=True)
    ]
    return float(np.mean(shares))
