"""The random numbers of a training: Philox's, or numpy's where a run was started with those by an earlier version.

A run goes on with the numbers it was started with, which its checkpoints name (`numbers`; without a name, numpy's).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor

from nestgen import philox, randomness

Shape = tuple[int, int, int]
Permute = Callable[[int], np.ndarray]


@dataclass(frozen=True)
class Numbers:
    """Functions of (seed, stream, sample), `samples` being consecutive ones.

    uniform      (seed, stream, samples, count): float64 in [0, 1), (B, count), on the CPU
    normal       (seed, stream, samples, (h, w, c), device): float32 (B, h, w, c)
    permutations (seed, stream, epoch): a function that gives one permutation of 0, ..., n - 1 after the other by n
    """

    uniform: Callable[[int, str, range, int], Tensor]
    normal: Callable[[int, str, range, Shape, torch.device], Tensor]
    permutations: Callable[[int, str, int], Permute]


def _philox_permutations(seed: int, stream: str, epoch: int) -> Permute:
    numbers = count()
    return lambda length: philox.permutation(seed, f"{stream}/{next(numbers)}", epoch, length)


def _numpy_uniform(seed: int, stream: str, samples: range, numbers: int) -> Tensor:
    return randomness.uniform(seed, stream, samples, (numbers,))


def _numpy_normal(seed: int, stream: str, samples: range, shape: Shape, device: torch.device) -> Tensor:
    h, w, c = shape
    return randomness.normal(seed, stream, samples, (c, h, w)).permute(0, 2, 3, 1).to(device)


def _numpy_permutations(seed: int, stream: str, epoch: int) -> Permute:
    return randomness.generator(seed, stream, epoch).permutation


NEWEST = "philox"
NUMBERS = {
    NEWEST: Numbers(philox.uniform, philox.normal, _philox_permutations),
    "numpy": Numbers(_numpy_uniform, _numpy_normal, _numpy_permutations),
}
