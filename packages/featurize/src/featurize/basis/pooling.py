"""Adaptive average pooling of a map to a smaller grid, as two explicit matrices."""

from __future__ import annotations

import numpy as np


def pooling_matrix(coarse: int, fine: int) -> np.ndarray:
    """(coarse, fine) float64, rows summing to 1: cell i averages [floor(i f/c), ceil((i+1) f/c)), as PyTorch's does.

    Where `fine` is not a multiple of `coarse` the bins overlap and differ in size.
    """
    matrix = np.zeros((coarse, fine))
    for cell in range(coarse):
        start, stop = cell * fine // coarse, -(-(cell + 1) * fine // coarse)
        matrix[cell, start:stop] = 1.0 / (stop - start)
    return matrix


def pool(f_BHWC: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """rows @ map @ columns^T for each map and channel, float32."""
    rows, columns = rows.astype(np.float32), columns.astype(np.float32)
    return np.einsum("hH,bHWc,wW->bhwc", rows, f_BHWC.astype(np.float32), columns, optimize=True)
