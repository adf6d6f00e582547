"""Training batches, each a function of (seed, step, global sample number) whatever the number of processes.

A level is read from memory if it fits there, by memory map if it is local, and from remote storage through a shuffle
buffer (order.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

from nestgen import randomness
from nestgen.diffusion.process import level_process
from nestgen.errors import UserError
from nestgen.recipe.recipe import Recipe
from nestgen.recipe.sections import Level
from nestgen.stores.hierarchy import LevelStores, open_level
from nestgen.stores.latent import to_latent
from nestgen.stores.remote import RemoteBlocks
from nestgen.stores.store import Store
from nestgen.training.order import next_group, rows_of_samples

AHEAD = 4  # batches prepared in advance
MEMORY_SHARE = 0.25  # of the free memory, for the levels of all processes of this machine


@dataclass(frozen=True)
class TrainingData:
    """What a level's batches are made from."""

    recipe: Recipe
    level: int
    stores: LevelStores
    read_from: Literal["memory", "memory maps", "remote storage"]

    def rows(self, samples: np.ndarray) -> np.ndarray:
        """The row of each global sample number."""
        return rows_of_samples(
            self.recipe.seed, self.stores.z.rows, samples, self.recipe.training.shuffle, self._block_rows
        )

    def fetch_ahead(self, sample: int) -> None:
        """Begins to fetch the blocks that will be needed after those of a sample, if they are remote."""
        shuffle = self.recipe.training.shuffle
        if self.read_from != "remote storage" or shuffle is None:
            return
        group = next_group(self.recipe.seed, self.stores.z.rows, sample, shuffle, self._block_rows)
        for store in (self.stores.z, *self.stores.above):
            if isinstance(store.blocks, RemoteBlocks):
                store.blocks.prefetch(group)

    @property
    def _block_rows(self) -> int:
        """Rows per block as stored: in memory a store has one block, and the order must not depend on that."""
        return int(self.stores.z.attributes["block_rows"])


@dataclass(frozen=True)
class Batch:
    """What a training step needs; the conditions, the nearest level first, are noised already."""

    z_BCHW: Tensor
    eps_BCHW: Tensor
    t_B: Tensor = field(metadata={"stays_on_cpu": True})  # where the process is evaluated, in float64
    conditions: tuple[Tensor, ...] = ()  # (B, C, H, W)
    sigma_BK: Tensor | None = None  # of each condition
    keep_B: Tensor | None = None  # false where the conditions are dropped
    label_B: Tensor | None = None
    context_BTD: Tensor | None = None  # embedded captions
    features_BChw: Tensor | None = None  # the stored features, on the grid of the tokens

    def to(self, device: torch.device) -> Batch:
        """The batch on a device, its times on the CPU."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in memory that a GPU can read by itself."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {
            one.name: tuple(map(change, value)) if isinstance(value, tuple) else change(value)
            for one in fields(self)
            if "stays_on_cpu" not in one.metadata and (value := getattr(self, one.name)) is not None
        }
        return replace(self, **changed)

    def denoiser_inputs(self) -> dict[str, Any]:
        """What the denoiser takes beside z_t and the time, by argument."""
        names = ("keep_B", "label_B", "context_BTD", "sigma_BK")
        return {"condition": self.conditions or None, **{name: getattr(self, name) for name in names}}

    def parts(self, most: int | None) -> list[Batch]:
        """The batch in parts of at most so many samples, in order; their sizes differ by one at most."""
        count = 1 if most is None else -(-len(self.z_BCHW) // most)
        chunks = {one.name: _chunks(getattr(self, one.name), count) for one in fields(self)}
        return [Batch(**{name: values[part] for name, values in chunks.items()}) for part in range(count)]


def _chunks(value: Any, count: int) -> list[Any]:
    if isinstance(value, tuple):
        return list(zip(*(one.tensor_split(count) for one in value))) if value else [()] * count
    return [None] * count if value is None else list(value.tensor_split(count))


def open_training_data(recipe: Recipe, level: int, processes: int = 1) -> TrainingData:
    """Opens what a level is trained on, in memory where it fits there.

    `processes` of this machine do the same. Raises UserError for what is too large and remote, unless
    `training.shuffle` is set.
    """
    stores = open_level(recipe, level)
    everything = stores.arrays()
    if sum(store.nbytes for store in everything) <= MEMORY_SHARE * psutil.virtual_memory().available / processes:
        return TrainingData(recipe, level, stores.in_memory(), "memory")
    if not any(isinstance(store.blocks, RemoteBlocks) for store in everything):
        return TrainingData(recipe, level, stores, "memory maps")
    if recipe.training.shuffle is None:
        raise UserError(
            f"{stores.z.path} is remote and too large for memory, and cannot be shuffled whole: set training.shuffle "
            f"of {recipe.file} to the rows of a shuffle buffer, such as 65536"
        )
    _cache_two_groups(recipe.training.shuffle, everything)
    return TrainingData(recipe, level, stores, "remote storage")


def _cache_two_groups(shuffle: int, stores: Sequence[Store]) -> None:
    for store in stores:
        if isinstance(store.blocks, RemoteBlocks):
            store.blocks.cached = 2 * max(1, shuffle // store.block_rows) + 2


class UniformNumbers(NamedTuple):
    """What is random about a sample besides its noises: uniform numbers in [0, 1), float64, one per sample.

    The order of the fields is that of the numbers in the stream: another order is another training.
    """

    view_B: Tensor
    keep_B: Tensor
    label_drop_B: Tensor
    time_B: Tensor
    caption_B: Tensor
    text_drop_B: Tensor
    sigma_KB: Tensor  # for each condition


def _uniform_numbers(seed: int, level: int, samples: Sequence[int], conditions: int) -> UniformNumbers:
    single = len(UniformNumbers._fields) - 1
    u_BN = randomness.uniform(seed, f"train/z{level}/draws", samples, (single + conditions,))
    return UniformNumbers._make([*u_BN.T[:single], u_BN.T[single:]])


def make_batch(data: TrainingData, step: int, process: int = 0, processes: int = 1, pin: bool = False) -> Batch:
    """One process's share of the global batch of a step, in memory that a GPU can read by itself if `pin`."""
    recipe, level, stores = data.recipe, data.level, data.stores
    options, above = recipe.training, recipe.conditions(level)
    share = options.batch // processes
    first = step * options.batch + process * share
    samples = np.arange(first, first + share)

    def normal(name: str, shape: tuple[int, int, int]) -> Tensor:
        h, w, c = shape
        return randomness.normal(recipe.seed, f"train/z{level}/{name}", samples.tolist(), (c, h, w))

    uniform = _uniform_numbers(recipe.seed, level, samples.tolist(), len(above))
    rows = data.rows(samples)
    data.fetch_ahead(first + share - 1)
    views = (uniform.view_B * stores.z.views).long().numpy()

    codec, shape = stores.z.attributes.get("codec"), stores.z.latent_shape
    moments = codec is not None and codec["moments"]
    z_BCHW = to_latent(stores.z.read(rows, views), codec, normal("posterior", shape) if moments else None)

    conditions, sigmas = [], []
    for number, store, u_B in zip(above, stores.above, uniform.sigma_KB):
        condition_BCHW = to_latent(store.read(rows, views), None, None)
        sigma_B = sample_sigma(recipe.levels[number].sigma, u_B)
        if sigma_B.any():
            name = "condition" if number == level + 1 else f"condition/z{number}"
            condition_BCHW += sigma_B[:, None, None, None] * normal(name, store.latent_shape)
        conditions.append(condition_BCHW)
        sigmas.append(sigma_B)
    label_B = None
    if stores.labels is not None:
        null = recipe.denoiser.labels
        label_B = torch.from_numpy(stores.labels[rows]).masked_fill(uniform.label_drop_B < options.label_drop, null)
    context_BTD = None
    if stores.captions is not None:
        captioned = stores.captions.sample(rows, uniform.caption_B.numpy())
        text_rows = np.where(uniform.text_drop_B.numpy() < options.text_drop, 0, captioned)
        context_BTD = torch.from_numpy(stores.captions.text.read(text_rows).astype(np.float32))
    batch = Batch(
        z_BCHW=z_BCHW,
        eps_BCHW=normal("eps", shape),
        t_B=level_process(recipe, level).training_time(uniform.time_B),
        conditions=tuple(conditions),
        sigma_BK=torch.stack(sigmas, 1) if sigmas else None,
        keep_B=uniform.keep_B >= options.condition_drop if conditions else None,
        label_B=label_B,
        context_BTD=context_BTD,
        features_BChw=None if stores.features is None else _on_grid(stores.features, rows, views, recipe.levels[level]),
    )
    return batch.pin_memory() if pin else batch


def _on_grid(features: Store, rows: np.ndarray, views: np.ndarray, level: Level) -> Tensor:
    """Stored features of some rows, (B, C, h, w): the average of those in each token of a level."""
    return F.adaptive_avg_pool2d(to_latent(features.read(rows, views), None, None), level.grid)


def sample_sigma(sigma: float | tuple[float, float], u_B: Tensor) -> Tensor:
    """A level's sigma for each sample, float32 (B,): the recipe's number, or one of its range by a uniform number."""
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
