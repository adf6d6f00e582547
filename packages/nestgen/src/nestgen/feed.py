"""Training batches, each a function of (seed, step, global sample index) whatever the process count."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestgen import noise
from nestgen.process import process_of
from nestgen.recipe import Recipe
from nestgen.store import Store, open_hierarchy, read_labels

AHEAD = 4  # batches prepared before they are asked for


@dataclass(frozen=True)
class Feed:
    """Where a level's batches come from."""

    recipe: Recipe
    level: int
    z: Store
    above: tuple[Store, ...]  # the levels that condition this one, the nearest first
    labels: np.ndarray | None  # (rows,)


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
        given = {"keep_B": self.keep_B, "label_B": self.label_B, "sigma_BK": self.sigma_BK}
        return {"condition": self.conditions or None, **given}


def open_feed(recipe: Recipe, level: int) -> Feed:
    """Opens a level's store, those that condition it and, where the recipe has labels, those."""
    z, *above = open_hierarchy(recipe, (level, *recipe.conditions(level)))
    labels = read_labels(recipe, z) if recipe.denoiser.labels else None
    return Feed(recipe, level, z, tuple(above), labels)


@lru_cache(maxsize=2)  # a batch may reach into the next epoch
def _order(seed: int, rows: int, epoch: int) -> np.ndarray:
    return noise.generator(seed, "train/order", epoch).permutation(rows)


def rows_of(seed: int, rows: int, samples: np.ndarray) -> np.ndarray:
    """The row of each global sample number: every epoch is another permutation of all rows."""
    epochs, places = np.divmod(samples, rows)
    out = np.empty_like(samples)
    for epoch in np.unique(epochs):
        out[epochs == epoch] = _order(seed, rows, int(epoch))[places[epochs == epoch]]
    return out


def to_latent(values: np.ndarray, codec: dict[str, Any] | None, noise_BCHW: Tensor | None) -> Tensor:
    """What a denoiser sees, float32 (B, C, H, W), of stored values (B, h, w, c).

    A level is taken as it is, z_0 times its codec's scale; of moments a sample of the posterior is drawn with
    `noise_BCHW`: mean + exp(log-variance / 2) noise, the log-variance within -30..20 as in AutoencoderKL.
    """
    # In numpy: torch's threads would take turns with those of the training step.
    x_BCHW = np.ascontiguousarray(values.transpose(0, 3, 1, 2), np.float32)
    if codec is None:
        return torch.from_numpy(x_BCHW)
    if codec["moments"]:
        mean_BCHW, logvar_BCHW = np.split(x_BCHW, 2, 1)
        assert noise_BCHW is not None
        x_BCHW = mean_BCHW + np.exp(0.5 * logvar_BCHW.clip(-30, 20)) * noise_BCHW.numpy()
    return torch.from_numpy(np.float32(codec["scale"]) * x_BCHW)


def make_batch(feed: Feed, step: int, process: int = 0, processes: int = 1) -> Batch:
    """One process's share of the global batch of a step."""
    options, seed = feed.recipe.training, feed.recipe.seed
    share = options.batch // processes
    first = step * options.batch + process * share
    samples = np.arange(first, first + share)

    def normal(name: str, shape: tuple[int, int, int]) -> Tensor:
        h, w, c = shape
        return noise.normal(seed, f"train/z{feed.level}/{name}", samples.tolist(), (c, h, w))

    above = feed.recipe.conditions(feed.level)
    u_BN = noise.uniform(seed, f"train/z{feed.level}/draws", samples.tolist(), (4 + len(above),))
    rows = rows_of(seed, feed.z.rows, samples)
    views = (u_BN[:, 0] * feed.z.views).long().numpy()

    codec = feed.z.attributes.get("codec")
    shape = feed.z.latent_shape
    moments = codec is not None and codec["moments"]
    z_BCHW = to_latent(feed.z.read(rows, views), codec, normal("posterior", shape) if moments else None)

    conditions, sigmas = [], []
    for number, store, u_B in zip(above, feed.above, u_BN.T[4:]):
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
    return Batch(
        z_BCHW=z_BCHW,
        eps_BCHW=normal("eps", shape),
        t_B=process_of(feed.recipe, feed.level).time(u_BN[:, 3]),
        conditions=tuple(conditions),
        sigma_BK=torch.stack(sigmas, 1) if sigmas else None,
        keep_B=u_BN[:, 1] >= options.condition_drop if conditions else None,
        label_B=label_B,
    )


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
