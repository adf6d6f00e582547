"""Sampling down the hierarchy: each level given those above it. There is no other way to an image."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from nestgen import randomness
from nestgen.diffusion.solvers import sample_level
from nestgen.sampling.conditions import ImageConditions
from nestgen.sampling.real import real_latents
from nestgen.sampling.trained import LevelSampler

MOST = 1024  # images of an upper level that are sampled together

# Gets the level, the numbers of the images, that of the network call from 0, its time, and the latent (B, C, H, W) that it
# predicted.
Callback = Callable[[int, Sequence[int], int, float, Tensor], object]


def no_callback(level: int, indices: Sequence[int], call: int, t: float, x_BCHW: Tensor) -> None:
    """Does nothing."""


@torch.inference_mode()
def sample_images(
    samplers: Sequence[LevelSampler],
    indices: Sequence[int],
    conditions: ImageConditions,
    latents: Mapping[int, Tensor] | None = None,
    callback: Callback = no_callback,
) -> dict[int, Tensor]:
    """Latents (B, C, H, W) of some images by level: those of `latents`, and one of each sampler whose level is not there.

    `samplers` may be those of some levels only, as long as the levels that condition them are in `latents`. Image i
    depends on (seed, i) alone: all noise is a function of (seed, level, i), whatever the depth of the hierarchy, the
    batch or the frozen levels. `callback` is called for sampled levels, not for frozen ones.
    """
    z = dict(latents or {})
    label_B, context_BTD = conditions.labels(indices), conditions.context(indices)

    def sample(sampler: LevelSampler, indices: Sequence[int], callback: Callback) -> Tensor:
        """A level of the first len(indices) images, with the noise of `indices`."""
        n, level, settings = len(indices), sampler.level, sampler.settings
        h, w, c = sampler.config.shape
        above = {one: z_BCHW[:n] for one, z_BCHW in z.items()}
        return sample_level(
            sampler.guided(
                _noised(sampler, above, indices, conditions.seed),
                None if label_B is None else label_B[:n],
                None if context_BTD is None else context_BTD[:n],
            ),
            sampler.trained.process,
            randomness.normal(conditions.seed, f"sample/z{level}", indices, (c, h, w)).to(sampler.device),
            settings.steps,
            settings.sampler,
            lambda call, t, x_BCHW: callback(level, indices, call, t, x_BCHW),
        )

    for sampler in sorted(samplers, key=lambda sampler: sampler.level, reverse=True):
        level = sampler.level
        if level in z:
            continue
        if not conditions.is_frozen(level):
            z[level] = sample(sampler, indices, callback)
        elif level in conditions.stores:
            assert conditions.frozen is not None
            z_BCHW = real_latents(conditions.stores[level], conditions.frozen.rows(indices), conditions.seed)
            z[level] = z_BCHW.contiguous()  # sums round by layout
        else:  # to image 0, whose class and caption all images share
            z[level] = sample(sampler, [0], no_callback).expand(len(indices), -1, -1, -1)
    return z


def _noised(sampler: LevelSampler, z: Mapping[int, Tensor], indices: Sequence[int], seed: int) -> Iterator[Tensor]:
    """The levels above, the nearest first, noised as in training; none at the top."""
    for level, sigma in enumerate(sampler.settings.sigmas, sampler.level + 1):
        assert level in z, f"z_{level} is neither frozen nor sampled"
        noise_BCHW = randomness.normal(seed, f"sample/condition/z{level}", indices, z[level].shape[1:])
        yield z[level].cpu() + sigma * noise_BCHW


def sample_in_batches(
    samplers: Sequence[LevelSampler],
    indices: Sequence[int],
    conditions: ImageConditions,
    batch: int,
    latents: Mapping[int, Tensor] | None = None,
    callback: Callback = no_callback,
    levels: Collection[int] | None = None,
) -> dict[int, Tensor]:
    """`sample_images` for any number of images, level after level: `batch` at a time, more of levels with few tokens.

    `samplers` are those of the whole hierarchy. Sampled are the `levels`, by default all that are not in `latents`.
    """
    z = dict(latents or {})
    batches = [range(first, min(first + batch, len(indices))) for first in range(0, len(indices), batch)]
    for sampler in reversed(samplers):
        if sampler.level in z or (levels is not None and sampler.level not in levels):
            continue
        parts = []
        for rows in together(batches, images_at_once(samplers, sampler.level, batch)):
            part = slice(rows.start, rows.stop)
            above = {level: z_NCHW[part] for level, z_NCHW in z.items()}
            parts.append(sample_images([sampler], indices[part], conditions, above, callback)[sampler.level].cpu())
        z[sampler.level] = torch.cat(parts)
    return z


def images_at_once(samplers: Sequence[LevelSampler], level: int, batch: int) -> int:
    """How many images of a level are sampled together: as many as need the memory of `batch` of z_0, at most MOST.

    A batch of an upper level, which has few tokens, would leave a GPU idle.
    """
    values = [(math.prod(one.config.grid) + 1) * one.config.dim for one in (samplers[0], samplers[level])]
    return batch if level == 0 else max(batch, min(MOST, batch * values[0] // values[1]))


def together(blocks: Sequence[range], images: int) -> list[range]:
    """The blocks in runs of as many as make up `images` rows, those at the end that fill no such run one by one.

    So that the rows sampled together depend on nothing but the block's size, and a run that goes on samples the same bits.
    """
    blocks_per_run = max(1, images // len(blocks[0]))
    whole = len(blocks) // blocks_per_run if len(blocks[-1]) == len(blocks[0]) else (len(blocks) - 1) // blocks_per_run
    firsts = range(0, whole * blocks_per_run, blocks_per_run)
    runs = [range(blocks[first].start, blocks[first + blocks_per_run - 1].stop) for first in firsts]
    return [*runs, *blocks[whole * blocks_per_run :]]


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
