"""Training batches, each a function of (seed, step, global sample index) whatever the process count.

A level is read from memory if it fits there, by memory map if it is local, and from afar with a shuffle buffer: blocks
in random order, rows shuffled within groups of blocks, the next group being fetched while this one is in use.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from nestgen import randomness as noise
from nestgen.diffusion.process import level_process
from nestgen.errors import UserError
from nestgen.recipe.recipe import Recipe
from nestgen.stores.latent import to_latent
from nestgen.stores.remote import RemoteBlocks
from nestgen.stores.store import Captions, Store, open_hierarchy, read_captions, read_labels

AHEAD = 4  # batches prepared before they are asked for
MEMORY_SHARE = 0.25  # of the free memory, for the levels of all processes of this machine


@dataclass(frozen=True)
class Feed:
    """Where a level's batches come from."""

    recipe: Recipe
    level: int
    z: Store
    above: tuple[Store, ...]  # the levels that condition this one, the nearest first
    labels: np.ndarray | None  # (rows,)
    captions: Captions | None
    where: str  # the values are read from, in words
    order_rows: int  # rows of a block in the order of a shuffle buffer


@dataclass(frozen=True)
class Batch:
    """What a training step needs; the conditions, the nearest level first, are noised already."""

    z_BCHW: Tensor
    eps_BCHW: Tensor
    t_B: Tensor
    conditions: tuple[Tensor, ...] = ()
    sigma_BK: Tensor | None = None  # of each condition
    keep_B: Tensor | None = None
    label_B: Tensor | None = None
    context_BTD: Tensor | None = None  # embedded captions

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch of all tensors changed, but for the times: the process is evaluated in float64 on the CPU."""
        changed: dict[str, Any] = {
            field.name: tuple(map(change, value)) if isinstance(value, tuple) else change(value)
            for field in fields(self)
            if field.name != "t_B" and (value := getattr(self, field.name)) is not None
        }
        return replace(self, **changed)

    def given(self) -> dict[str, Any]:
        """What the denoiser takes beside z_t and the time, by argument."""
        names = ("keep_B", "label_B", "context_BTD", "sigma_BK")
        return {"condition": self.conditions or None, **{name: getattr(self, name) for name in names}}

    def parts(self, count: int) -> list[Batch]:
        """The batch in equal parts, in order."""
        cut = {field.name: _cut(getattr(self, field.name), count) for field in fields(self)}
        return [Batch(**{name: values[part] for name, values in cut.items()}) for part in range(count)]


def _cut(value: Any, count: int) -> list[Any]:
    if isinstance(value, tuple):
        return list(zip(*(one.chunk(count) for one in value))) if value else [()] * count
    return [None] * count if value is None else list(value.chunk(count))


@dataclass(frozen=True)
class Order:
    """The rows of one epoch in order, and the blocks they come from: `groups[i]` until place `ends[i]`.

    Without a shuffle buffer there is no group.
    """

    rows: np.ndarray
    groups: tuple[np.ndarray, ...] = ()
    ends: tuple[int, ...] = ()


def open_feed(recipe: Recipe, level: int, sharers: int = 1) -> Feed:
    """Opens a level's store, those that condition it and, where the recipe has them, labels and captions.

    `sharers` is how many processes of this machine do the same.
    """
    stores = list(open_hierarchy(recipe, (level, *recipe.conditions(level))))
    labels = read_labels(recipe, stores[0]) if recipe.denoiser.labels else None
    captions = read_captions(recipe, stores[0]) if recipe.denoiser.text else None
    everything = [*stores, captions.text] if captions else stores
    remote = any(isinstance(store.blocks, RemoteBlocks) for store in everything)
    if sum(store.nbytes for store in everything) <= MEMORY_SHARE * psutil.virtual_memory().available / sharers:
        stores = [store.in_memory() for store in stores]
        captions = captions and replace(captions, text=captions.text.in_memory())
        where = "memory"
    elif remote:
        if recipe.training.shuffle is None:
            raise UserError(
                f"{stores[0].path} is remote and too large for memory, and cannot be shuffled whole: set training.shuffle "
                f"of {recipe.file} to the rows of a shuffle buffer, such as 65536"
            )
        _keep_two_groups(recipe.training.shuffle, everything)
        where = "afar"
    else:
        where = "memory maps"
    z, *above = stores
    return Feed(recipe, level, z, tuple(above), labels, captions, where, z.attributes["block_rows"])


def _keep_two_groups(shuffle: int, stores: Sequence[Store]) -> None:
    for store in stores:
        if isinstance(store.blocks, RemoteBlocks):
            store.blocks.kept = 2 * max(1, shuffle // store.block_rows) + 2


@lru_cache(maxsize=4)  # a batch may reach into the next epoch
def order_of(seed: int, rows: int, epoch: int, shuffle: int | None, block_rows: int) -> Order:
    """Every epoch is another permutation of all rows; with a buffer of `shuffle` rows, one that goes block by block."""
    rng = noise.generator(seed, "train/order", epoch)
    if shuffle is None:
        return Order(rng.permutation(rows))
    blocks = rng.permutation(-(-rows // block_rows))
    size = max(1, shuffle // block_rows)
    groups = [blocks[first : first + size] for first in range(0, len(blocks), size)]
    members = [
        rng.permutation(np.concatenate([np.arange(b * block_rows, min(rows, (b + 1) * block_rows)) for b in group]))
        for group in groups
    ]
    return Order(np.concatenate(members), tuple(groups), tuple(np.cumsum([len(one) for one in members]).tolist()))


def rows_of(seed: int, rows: int, samples: np.ndarray, shuffle: int | None = None, block_rows: int = 1) -> np.ndarray:
    """The row of each global sample number."""
    epochs, places = np.divmod(samples, rows)
    out = np.empty_like(samples)
    for epoch in np.unique(epochs):
        order = order_of(seed, rows, int(epoch), shuffle, block_rows)
        out[epochs == epoch] = order.rows[places[epochs == epoch]]
    return out


def _fetch_ahead(feed: Feed, sample: int) -> None:
    """Begins to fetch the blocks of the group that follows a sample's."""
    options, z = feed.recipe.training, feed.z
    epoch, place = divmod(sample, z.rows)
    order = order_of(feed.recipe.seed, z.rows, epoch, options.shuffle, feed.order_rows)
    after = bisect_right(order.ends, place) + 1
    if after == len(order.groups):
        order, after = order_of(feed.recipe.seed, z.rows, epoch + 1, options.shuffle, feed.order_rows), 0
    for store in (z, *feed.above):
        if isinstance(store.blocks, RemoteBlocks):
            store.blocks.prefetch(order.groups[after])


def make_batch(feed: Feed, step: int, process: int = 0, processes: int = 1, pin: bool = False) -> Batch:
    """One process's share of the global batch of a step, in memory that a GPU can read by itself if `pin`."""
    options, seed = feed.recipe.training, feed.recipe.seed
    share = options.batch // processes
    first = step * options.batch + process * share
    samples = np.arange(first, first + share)

    def normal(name: str, shape: tuple[int, int, int]) -> Tensor:
        h, w, c = shape
        return noise.normal(seed, f"train/z{feed.level}/{name}", samples.tolist(), (c, h, w))

    above = feed.recipe.conditions(feed.level)
    u_BN = noise.uniform(seed, f"train/z{feed.level}/draws", samples.tolist(), (6 + len(above),))
    rows = rows_of(seed, feed.z.rows, samples, options.shuffle, feed.order_rows)
    if feed.where == "afar":
        _fetch_ahead(feed, first + share - 1)
    views = (u_BN[:, 0] * feed.z.views).long().numpy()

    codec = feed.z.attributes.get("codec")
    shape = feed.z.latent_shape
    moments = codec is not None and codec["moments"]
    z_BCHW = to_latent(feed.z.read(rows, views), codec, normal("posterior", shape) if moments else None)

    conditions, sigmas = [], []
    for number, store, u_B in zip(above, feed.above, u_BN.T[6:]):
        condition_BCHW = to_latent(store.read(rows, views), None, None)
        sigma_B = draw_sigma(feed.recipe.levels[number].sigma, u_B)
        if sigma_B.any():
            name = "condition" if number == feed.level + 1 else f"condition/z{number}"
            condition_BCHW += sigma_B[:, None, None, None] * normal(name, store.latent_shape)
        conditions.append(condition_BCHW)
        sigmas.append(sigma_B)
    label_B = None
    if feed.labels is not None:
        null = feed.recipe.denoiser.labels
        label_B = torch.from_numpy(feed.labels[rows]).masked_fill(u_BN[:, 2] < options.label_drop, null)
    context_BTD = None
    if feed.captions is not None:
        drawn = feed.captions.draw(rows, u_BN[:, 4].numpy())
        kept = np.where(u_BN[:, 5].numpy() < options.text_drop, 0, drawn)
        context_BTD = torch.from_numpy(feed.captions.text.read(kept).astype(np.float32))
    batch = Batch(
        z_BCHW=z_BCHW,
        eps_BCHW=normal("eps", shape),
        t_B=level_process(feed.recipe, feed.level).training_time(u_BN[:, 3]),
        conditions=tuple(conditions),
        sigma_BK=torch.stack(sigmas, 1) if sigmas else None,
        keep_B=u_BN[:, 1] >= options.condition_drop if conditions else None,
        label_B=label_B,
        context_BTD=context_BTD,
    )
    return batch.each(Tensor.pin_memory) if pin else batch


def draw_sigma(sigma: float | tuple[float, float], u_B: Tensor) -> Tensor:
    """A level's sigma for each sample, float32: the recipe's number, or one of its range by a uniform number."""
    low, high = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    return (low + (high - low) * u_B).float()


def prefetch(make: Callable[[int], Batch], first: int, last: int) -> Generator[Batch]:
    """make(first), ..., make(last - 1), prepared ahead by a background thread; its errors are raised here."""
    with ThreadPoolExecutor(1) as pool:
        try:
            waiting = deque(pool.submit(make, step) for step in range(first, min(first + AHEAD, last)))
            for step in range(first + AHEAD, last + AHEAD):
                if not waiting:
                    return
                batch = waiting.popleft().result()
                if step < last:
                    waiting.append(pool.submit(make, step))
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)
