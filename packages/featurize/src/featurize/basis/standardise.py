"""Mean and standard deviation per channel, by which a level is standardised: stored = (pooled - mean) / std."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from featurize.errors import UserError


@dataclass(frozen=True)
class Sums:
    """Count, mean (C) and sum of squared deviations (C) of some values, float64."""

    count: int
    mean: np.ndarray
    square: np.ndarray

    @property
    def std(self) -> np.ndarray:
        """(C,) of the population."""
        return np.sqrt(self.square / self.count)


def sums_of(values: np.ndarray) -> Sums:
    """Sums per channel over everything but the last axis, in float64."""
    flat = values.reshape(-1, values.shape[-1]).astype(np.float64)
    mean = flat.mean(axis=0)
    return Sums(len(flat), mean, ((flat - mean) ** 2).sum(axis=0))


def merge_sums(parts: Iterable[Sums]) -> Sums:
    """The sums of all, merged from the first to the last (Chan et al.): the order is part of the result."""
    count, mean, square = 0, np.zeros(1), np.zeros(1)
    for part in parts:
        delta = part.mean - mean
        square = square + part.square + delta**2 * (count * part.count / (count + part.count))
        mean = mean + delta * (part.count / (count + part.count))
        count += part.count
    return Sums(count, mean, square)


def check_varies(std: np.ndarray, name: str) -> None:
    """Raises UserError where a channel of the level `name` is constant, so that it can't be divided by its std (C)."""
    constant = np.flatnonzero(~(std > 1e-6 * std.max(initial=0.0)))
    if constant.size == std.size:  # a single image and a level of one cell, for one
        raise UserError(f"The level {name} is constant over these images; give more images, or leave that level out.")
    if constant.size:
        raise UserError(
            f"Channel {constant[0]} of the level {name} is constant over these images; ask for fewer channels."
        )
