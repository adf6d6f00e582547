"""Exact nearest neighbours with FAISS, in a process of its own: FAISS and torch each bring an OpenMP runtime."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np


def nearest(gallery_ND: np.ndarray, queries_QD: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(cosine similarities, row numbers), each (Q, count), most alike first, by an exact search.

    Rows are normalised to unit length first. Where the gallery has fewer than `count` rows, all of them come.
    """
    count = min(count, len(gallery_ND))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_search, _unit(gallery_ND), _unit(queries_QD), count).result()


def label_agreement(labels_N: np.ndarray, query_rows: np.ndarray, found_QK: np.ndarray) -> float | None:
    """Mean share of the neighbours that have the query's label; None without labels.

    A query's own row must not be among its neighbours. Queries without a label (-1) don't count.
    """
    labelled = labels_N[query_rows] >= 0
    if not labelled.any():
        return None
    same = labels_N[found_QK] == labels_N[query_rows][:, None]
    return float(same[labelled].mean())


def without_self(rows_Q: np.ndarray, found_QK: np.ndarray, keep: int) -> np.ndarray:
    """(Q, keep): the neighbours less the query itself, which need not come first among exact copies."""
    return np.stack([found[found != row][:keep] for row, found in zip(rows_Q, found_QK, strict=True)])


def _unit(x_ND: np.ndarray) -> np.ndarray:
    x = np.ascontiguousarray(x_ND, dtype=np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _search(gallery: np.ndarray, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    import faiss

    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(gallery)
    return index.search(queries, count)
