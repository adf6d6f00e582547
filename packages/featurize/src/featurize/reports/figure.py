"""What `info` says of the encoders' arrays, as a figure: explained variance, effective rank, outlier tokens, mean and std."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featurize.basis.svd import effective_rank
from featurize.errors import UserError
from featurize.io.files import atomic_write
from featurize.store.read import read_sealed_metadata, sealed_arrays, sealed_levels
from featurize.store.seal import read_seal


@dataclass(frozen=True)
class EncoderFacts:
    """One encoder's folder: the share of the variance per stored channel (K), falling; what the seal measured on all
    tokens (`effective_rank`, `outlier_share`), where it did; and for each level its name, mean (C) and std (C) per channel,
    after pooling."""

    name: str
    explained_K: np.ndarray
    measured: dict[str, float]
    levels: tuple[tuple[str, np.ndarray, np.ndarray], ...]


def encoders_of(root: Path) -> list[EncoderFacts]:
    """The facts of every encoder with a sealed base store below `root`."""
    return [_facts(path) for path in sealed_arrays(root, "base")]


def draw_info(root: Path, out: Path) -> None:
    """A row of three plots for each encoder of the store root. Raises UserError where there is nothing to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    encoders = encoders_of(root)
    if not encoders:
        raise UserError(
            f"{root} holds no sealed base store, so there is nothing to draw; `featurize extract` makes one."
        )
    figure = Figure(figsize=(13, 3.8 * len(encoders)), layout="constrained")
    for axes, facts in zip(figure.subplots(len(encoders), 3, squeeze=False), encoders, strict=True):
        _draw_variance(axes[0], facts)
        for one, index, what in ((axes[1], 1, "mean"), (axes[2], 2, "std")):
            for level in facts.levels:
                one.plot(np.arange(1, len(level[index]) + 1), level[index], label=level[0], linewidth=1)
            one.set(title=f"{what} of a channel after pooling", xlabel="channel")
            one.axhline(0, color="lightgray", linewidth=0.8, zorder=0)
            if facts.levels:
                one.legend(fontsize=8)
            else:
                one.text(0.5, 0.5, "no level is sealed", ha="center", transform=one.transAxes)
    with atomic_write(out) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


def _draw_variance(axes: Any, facts: EncoderFacts) -> None:
    """Cumulative shares, with a mark where each level cuts its channels."""
    channels = np.arange(1, len(facts.explained_K) + 1)
    cumulative = 100 * np.cumsum(facts.explained_K)
    axes.plot(channels, cumulative, color="black", linewidth=1.5)
    axes.bar(channels, 100 * facts.explained_K, color="steelblue", width=1.0)
    for name, mean, _ in facts.levels:
        channel = len(mean)
        axes.plot(channel, cumulative[channel - 1], "o", markersize=4, color="crimson")
        axes.annotate(
            name, (channel, cumulative[channel - 1]), textcoords="offset points", xytext=(-4, 5), ha="right", fontsize=8
        )
    lines = [
        facts.name,
        f"effective rank {effective_rank(facts.explained_K):.1f} of the {len(channels)} stored channels",
    ]
    if "effective_rank" in facts.measured:
        lines[-1] += f", {facts.measured['effective_rank']:.1f} of all"
    if "outlier_share" in facts.measured:
        lines.append(f"outlier tokens make {facts.measured['outlier_share']:.1%} of the first channel's variance")
    axes.set_title("\n".join(lines), fontsize=9)
    axes.set(xlabel="channel", ylabel="variance explained, %", ylim=(0, 105))


def _facts(base_path: Path) -> EncoderFacts:
    attributes = read_sealed_metadata(base_path).attributes
    levels = []
    for path in sealed_levels(base_path.parent):
        level = read_sealed_metadata(path).attributes
        levels.append((path.stem, np.array(level["mean"]), np.array(level["std"])))
    return EncoderFacts(
        str(attributes["encoder"]),
        np.array(attributes["explained_variance"]),
        read_seal(base_path).get("features", {}),
        tuple(levels),
    )
