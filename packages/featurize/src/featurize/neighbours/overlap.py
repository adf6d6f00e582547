"""How far two spaces agree about what is alike: the share of neighbours that they have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from featurize.io.files import atomic_write
from featurize.neighbours.search import shared_share


def overlap_matrix(neighbours: Mapping[str, np.ndarray]) -> np.ndarray:
    """(S, S): for each two spaces, |K nearest in one and in the other| / K, averaged over the queries; diagonal 1.

    `neighbours` holds each space's nearest (Q, K) of the same queries, without the queries themselves.
    """
    return np.array([[shared_share(first, second) for second in neighbours.values()] for first in neighbours.values()])


def draw_overlap(names: list[str], matrix_SS: np.ndarray, count: int, out: Path) -> None:
    """The matrix as a picture with its numbers in per cent."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    side = 2.2 + 0.62 * len(names)
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(100 * matrix_SS, cmap="viridis", vmin=0, vmax=100)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    for (line, column), share in np.ndenumerate(matrix_SS):
        colour = "black" if share > 0.6 else "white"
        axes.text(column, line, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=9)
    axes.set_title(f"{count} nearest neighbours in common, %", fontsize=10)
    figure.colorbar(image, shrink=0.7)
    with atomic_write(out) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))
