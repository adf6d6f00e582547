"""The order of the rows: every epoch is another permutation, a function of (seed, epoch) only.

With a shuffle buffer the order goes through blocks at random and shuffles rows within groups of blocks, so that the
next group can be fetched while this one is in use.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nestgen.training.numbers import NEWEST, NUMBERS


@dataclass(frozen=True)
class EpochOrder:
    """The rows of one epoch in order, and the blocks they come from: `groups[i]` until place `ends[i]`.

    Without a shuffle buffer there is no group.
    """

    rows: np.ndarray
    groups: tuple[np.ndarray, ...] = ()
    ends: tuple[int, ...] = ()


@lru_cache(maxsize=4)  # a batch may reach into the next epoch
def epoch_order(
    seed: int, rows: int, epoch: int, shuffle: int | None, block_rows: int, numbers: str = NEWEST
) -> EpochOrder:
    """A permutation of all rows; with a buffer of `shuffle` rows, one that goes block by block."""
    permutation = NUMBERS[numbers].permutations(seed, "train/order", epoch)
    if shuffle is None:
        return EpochOrder(permutation(rows))
    blocks = permutation(-(-rows // block_rows))
    size = max(1, shuffle // block_rows)
    groups = [blocks[first : first + size] for first in range(0, len(blocks), size)]
    members = []
    for group in groups:
        of_group = np.concatenate([np.arange(b * block_rows, min(rows, (b + 1) * block_rows)) for b in group])
        members.append(of_group[permutation(len(of_group))])
    return EpochOrder(np.concatenate(members), tuple(groups), tuple(np.cumsum([len(one) for one in members]).tolist()))


def rows_of_samples(
    seed: int,
    rows: int,
    samples: np.ndarray,
    shuffle: int | None = None,
    block_rows: int = 1,
    numbers: str = NEWEST,
) -> np.ndarray:
    """The row of each global sample number, counted over all epochs."""
    epochs, places = np.divmod(samples, rows)
    out = np.empty_like(samples)
    for epoch in np.unique(epochs):
        order = epoch_order(seed, rows, int(epoch), shuffle, block_rows, numbers)
        out[epochs == epoch] = order.rows[places[epochs == epoch]]
    return out


def next_group(seed: int, rows: int, sample: int, shuffle: int, block_rows: int, numbers: str = NEWEST) -> np.ndarray:
    """The blocks of the group that follows the one of a global sample number."""
    epoch, place = divmod(sample, rows)
    order = epoch_order(seed, rows, epoch, shuffle, block_rows, numbers)
    after = bisect_right(order.ends, place) + 1
    if after == len(order.groups):
        order, after = epoch_order(seed, rows, epoch + 1, shuffle, block_rows, numbers), 0
    return order.groups[after]
