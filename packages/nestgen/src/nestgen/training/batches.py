"""Training batches, each a function of (seed, step, global sample number) whatever the number of processes.

A level is read from memory if it fits there, by memory map if it is local, and from remote storage through a shuffle
buffer (order.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

from nestgen.diffusion.process import Coefficients, level_process
from nestgen.errors import UserError
from nestgen.recipe.recipe import Recipe
from nestgen.stores.hierarchy import LevelStores, open_level
from nestgen.stores.latent import latent
from nestgen.stores.remote import RemoteBlocks
from nestgen.stores.store import Store
from nestgen.training.numbers import NEWEST, NUMBERS
from nestgen.training.order import next_group, rows_of_samples

T = TypeVar("T")
AHEAD = 4  # batches prepared in advance
MEMORY_SHARE = 0.25  # of the free memory, for the levels of all processes of this machine


@dataclass(frozen=True)
class TrainingData:
    """What a level's batches are made from."""

    recipe: Recipe
    level: int
    stores: LevelStores
    read_from: Literal["memory", "memory maps", "remote storage"]
    numbers: str = NEWEST  # one of NUMBERS

    def rows(self, samples: np.ndarray) -> np.ndarray:
        """The row of each global sample number."""
        shuffle, block_rows = self.recipe.training.shuffle, self._block_rows
        return rows_of_samples(self.recipe.seed, self.stores.z.rows, samples, shuffle, block_rows, self.numbers)

    def fetch_ahead(self, sample: int) -> None:
        """Begins to fetch the blocks that will be needed after those of a sample, if they are remote."""
        shuffle = self.recipe.training.shuffle
        if self.read_from != "remote storage" or shuffle is None:
            return
        rows, block_rows = self.stores.z.rows, self._block_rows
        group = next_group(self.recipe.seed, rows, sample, shuffle, block_rows, self.numbers)
        for store in (self.stores.z, *self.stores.above):
            if isinstance(store.blocks, RemoteBlocks):
                store.blocks.prefetch(group)

    @property
    def _block_rows(self) -> int:
        """Rows per block as stored: in memory a store has one block, and the order must not depend on that."""
        return int(self.stores.z.attributes["block_rows"])


@dataclass(frozen=True)
class Batch:
    """What a training step needs, on its device; the conditions, the nearest level first, are noised already.

    Images are (B, C, H, W) by their strides and (B, H, W, C) in memory, as they are stored and as convolutions like them.
    """

    z_BCHW: Tensor
    eps_BCHW: Tensor
    at: Coefficients  # of the process at the samples' times
    conditions: tuple[Tensor, ...] = ()  # (B, C, H, W)
    sigma_BK: Tensor | None = None  # of each condition
    keep_B: Tensor | None = None  # false where the conditions are dropped
    label_B: Tensor | None = None
    context_BTD: Tensor | None = None  # embedded captions
    features_BChw: Tensor | None = None  # the stored features, on the grid of the tokens

    def to(self, device: torch.device) -> Batch:
        """The batch on a device, for which it does not wait."""
        moved: Batch = map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))
        return moved

    def denoiser_inputs(self) -> dict[str, Any]:
        """What the denoiser takes beside z_t and the time, by argument."""
        names = ("keep_B", "label_B", "context_BTD", "sigma_BK")
        return {"condition": self.conditions or None, **{name: getattr(self, name) for name in names}}

    def parts(self, most: int | None) -> list[Batch]:
        """The batch in parts of at most so many samples, in order; their sizes differ by one at most."""
        count = 1 if most is None else -(-len(self.z_BCHW) // most)

        def part(number: int) -> Batch:
            taken: Batch = map_tensors(self, lambda tensor: tensor.tensor_split(count)[number])
            return taken

        return [part(number) for number in range(count)]


@dataclass(frozen=True)
class StoredBatch:
    """What of a batch is read or small, on the CPU: stored values as they are, (B, h, w, c) float16.

    `finish_batch` does the rest where the step is done: latents and noise are many times as much as what they are made from.
    """

    samples: range  # global numbers
    z_Bhwc: Tensor
    conditions: tuple[Tensor, ...]
    features_Bhwc: Tensor | None
    context_BTD: Tensor | None
    at: Coefficients
    sigma_BK: Tensor | None
    keep_B: Tensor | None
    label_B: Tensor | None

    def pin_memory(self) -> StoredBatch:
        """The batch in memory that a GPU can read by itself."""
        pinned: StoredBatch = map_tensors(self, Tensor.pin_memory)
        return pinned


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A dataclass or tuple with all tensors in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(map_tensors(one, change) for one in value)
    if is_dataclass(value):
        return replace(value, **{one.name: map_tensors(getattr(value, one.name), change) for one in fields(value)})  # type: ignore[type-var]
    return value


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


def _uniform_numbers(data: TrainingData, samples: range, conditions: int) -> UniformNumbers:
    single = len(UniformNumbers._fields) - 1
    stream = f"train/z{data.level}/draws"
    u_BN = NUMBERS[data.numbers].uniform(data.recipe.seed, stream, samples, single + conditions)
    return UniformNumbers._make([*u_BN.T[:single], u_BN.T[single:]])


def read_batch(data: TrainingData, step: int, process: int = 0, processes: int = 1) -> StoredBatch:
    """One process's share of the global batch of a step, as it is stored."""
    recipe, level, stores = data.recipe, data.level, data.stores
    options, above = recipe.training, recipe.conditions(level)
    share = options.batch // processes
    first = step * options.batch + process * share
    samples = range(first, first + share)
    uniform = _uniform_numbers(data, samples, len(above))
    rows = data.rows(np.arange(first, first + share))
    data.fetch_ahead(first + share - 1)
    views = (uniform.view_B * stores.z.views).long().numpy()

    def stored(store: Store) -> Tensor:
        return torch.from_numpy(store.read(rows, views))

    sigmas = [sample_sigma(recipe.levels[number].sigma, u_B) for number, u_B in zip(above, uniform.sigma_KB)]
    label_B = None
    if stores.labels is not None:
        null = recipe.denoiser.labels
        label_B = torch.from_numpy(stores.labels[rows]).masked_fill(uniform.label_drop_B < options.label_drop, null)
    context_BTD = None
    if stores.captions is not None:
        captioned = stores.captions.sample(rows, uniform.caption_B.numpy())
        text_rows = np.where(uniform.text_drop_B.numpy() < options.text_drop, 0, captioned)
        context_BTD = torch.from_numpy(stores.captions.text.read(text_rows))
    process_of_level = level_process(recipe, level)
    return StoredBatch(
        samples=samples,
        z_Bhwc=stored(stores.z),
        conditions=tuple(stored(store) for store in stores.above),
        features_Bhwc=None if stores.features is None else stored(stores.features),
        context_BTD=context_BTD,
        at=process_of_level.at(process_of_level.training_time(uniform.time_B)),
        sigma_BK=torch.stack(sigmas, 1) if sigmas else None,
        keep_B=uniform.keep_B >= options.condition_drop if above else None,
        label_B=label_B,
    )


def make_batch(data: TrainingData, step: int, process: int = 0, processes: int = 1) -> Batch:
    """One process's share of the global batch of a step, on the CPU."""
    return finish_batch(data, read_batch(data, step, process, processes), torch.device("cpu"))


def finish_batch(data: TrainingData, stored: StoredBatch, device: torch.device) -> Batch:
    """A batch on a device, for which it does not wait: stored values become latents, and noise is made."""
    recipe, level = data.recipe, data.level
    samples = stored.samples
    stored = map_tensors(stored, lambda tensor: tensor.to(device, non_blocking=True))

    def normal(name: str, shape: tuple[int, int, int]) -> Tensor:
        return NUMBERS[data.numbers].normal(recipe.seed, f"train/z{level}/{name}", samples, shape, device)

    codec, shape = data.stores.z.attributes.get("codec"), data.stores.z.latent_shape
    moments = codec is not None and codec["moments"]
    z_Bhwc = latent(stored.z_Bhwc, codec, normal("posterior", shape) if moments else None)
    conditions = []
    for k, (number, values_Bhwc) in enumerate(zip(recipe.conditions(level), stored.conditions)):
        condition_Bhwc = latent(values_Bhwc, None, None)
        if recipe.levels[number].sigma != 0:
            assert stored.sigma_BK is not None
            name = "condition" if number == level + 1 else f"condition/z{number}"
            noise_Bhwc = normal(name, recipe.levels[number].shape)
            condition_Bhwc += noise_Bhwc.mul_(stored.sigma_BK[:, k, None, None, None])
        conditions.append(condition_Bhwc.permute(0, 3, 1, 2))
    features_BChw = None
    if stored.features_Bhwc is not None:  # the average of those in each token
        features_BCHW = stored.features_Bhwc.float().permute(0, 3, 1, 2)
        features_BChw = F.adaptive_avg_pool2d(features_BCHW, recipe.levels[level].grid)
    return Batch(
        z_BCHW=z_Bhwc.permute(0, 3, 1, 2),
        eps_BCHW=normal("eps", shape).permute(0, 3, 1, 2),
        at=stored.at,
        conditions=tuple(conditions),
        sigma_BK=stored.sigma_BK,
        keep_B=stored.keep_B,
        label_B=stored.label_B,
        context_BTD=None if stored.context_BTD is None else stored.context_BTD.float(),
        features_BChw=features_BChw,
    )


def sample_sigma(sigma: float | tuple[float, float], u_B: Tensor) -> Tensor:
    """A level's sigma for each sample, float32 (B,): the recipe's number, or one of its range by a uniform number."""
    low, high = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    return (low + (high - low) * u_B).float()


def prefetch(make: Callable[[int], T], first: int, last: int) -> Generator[T]:
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
