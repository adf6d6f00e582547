"""Random numbers of a training: Philox4x64-10 words as functions of (seed, stream, row), the same on every device.

Philox (Salmon et al. 2011) is a cipher of a counter, so that any word is computed without those before it. Row i of a stream
whose rows have b blocks of four words begins at counter i b. The words are those of `np.random.Philox(key, counter)`: on CPUs
numpy makes them, elsewhere integer operations of torch do. What is made of them here needs nothing else of numpy, whose
own normal numbers and permutations may be others in another version.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestgen.compiler import missing_compiler
from nestgen.randomness import key_of

MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B  # what the two halves of the key grow by from round to round
ROUNDS = 10
CHUNK = 2**15  # normal numbers made at a time on a CPU, so that they stay in its cache
LOW = 0xFFFFFFFF


def words(seed: int, stream: str, rows: range, blocks: int, device: torch.device | str = "cpu") -> Tensor:
    """64 random bits each, int64 (len(rows), 4 blocks)."""
    first, count = rows.start * blocks, len(rows) * blocks
    if torch.device(device).type == "cpu":
        raw = np.random.Philox(key=key_of(seed, stream), counter=first).random_raw(4 * count)
        return torch.from_numpy(raw.view(np.int64)).view(len(rows), -1)
    # numpy counts before it computes: its first block is that of counter + 1
    counter_N = torch.arange(count, device=device) + (first + 1)
    return _compiled()(counter_N, _halves(seed, stream, str(device))).view(len(rows), -1)


def uniform(seed: int, stream: str, rows: range, count: int) -> Tensor:
    """Uniform numbers in [0, 1), multiples of 2^-53, float64 (len(rows), count), on the CPU."""
    bits = words(seed, stream, rows, -(-count // 4))[:, :count].numpy().view(np.uint64)
    return torch.from_numpy((bits >> np.uint64(11)) * 2.0**-53)


def normal(seed: int, stream: str, rows: range, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Standard normal numbers, float32 (len(rows), *shape). Their words are the same on all devices, they to rounding.

    Box and Muller's method: of n numbers the radii are made of a row's first n / 2 words of 32 bits, and the angles of the next
    n / 2 of 16. So few angles are no restriction: the mean over m equal steps of a circle is exact for all waves below m.
    """
    values = math.prod(shape)
    pairs = -(-values // 2)
    blocks = -(-6 * pairs // 32)
    if torch.device(device).type != "cpu":
        on_device = words(seed, stream, rows, blocks, device)
        of_32, of_16 = on_device.view(torch.int32)[:, :pairs], on_device.view(torch.int16)[:, 2 * pairs : 3 * pairs]
        out = torch.empty(len(rows), 2 * pairs, device=device)
        _box_muller((of_32 & 0x7FFFFFFF).float(), of_16.float(), out, torch)
        return out[:, :values].reshape(len(rows), *shape)
    # In numpy, whose functions are faster here than torch's and leave the threads of the training step alone.
    array = np.empty((len(rows), 2 * pairs), np.float32)
    raw = np.random.Philox(key=key_of(seed, stream), counter=rows.start * blocks).random_raw
    step = max(1, CHUNK // (2 * pairs))
    for first in range(0, len(rows), step):
        chunk = array[first : first + step]
        bits = raw(4 * blocks * len(chunk)).view(np.int32).reshape(len(chunk), -1)
        radii, angles = bits[:, :pairs] & 0x7FFFFFFF, bits.view(np.int16)[:, 2 * pairs : 3 * pairs]
        _box_muller(radii.astype(np.float32), angles.astype(np.float32), chunk, np)
    return torch.from_numpy(array[:, :values]).reshape(len(rows), *shape)


def permutation(seed: int, stream: str, row: int, length: int) -> np.ndarray:
    """A permutation of 0, ..., length - 1: the order of a row of words."""
    bits = words(seed, stream, range(row, row + 1), -(-length // 4))[0, :length]
    return np.argsort(bits.numpy(), kind="stable")


def _box_muller(radii: Any, angles: Any, out: Any, library: Any) -> None:
    """Writes r cos a beside r sin a (N, 2 K) for float32 (N, K) of 31 random bits and of 16, arrays of numpy or torch.

    r = sqrt(-2 log u) with u in (0, 1], so that r is 6.7 at most.
    """
    pairs = radii.shape[1]
    radii += 0.5
    radii *= 2.0**-31
    library.log(radii, out=radii)
    radii *= -2
    library.sqrt(radii, out=radii)
    angles *= 2 * math.pi * 2.0**-16
    library.cos(angles, out=out[:, :pairs])
    library.sin(angles, out=out[:, pairs:])
    out[:, :pairs] *= radii
    out[:, pairs:] *= radii


def philox(counter_N: Tensor, key_2: Tensor) -> Tensor:
    """The four words (N, 4) of blocks by the lowest word of their counter, the others being 0; all int64."""
    zeros_N = torch.zeros_like(counter_N)
    c = [counter_N, zeros_N, zeros_N, zeros_N]
    for number in range(ROUNDS):
        k = [key_2[i] + _signed(number * WEYL[i] % 2**64) for i in (0, 1)]
        (high_0, low_0), (high_1, low_1) = _multiply(c[0], MULTIPLIERS[0]), _multiply(c[2], MULTIPLIERS[1])
        c = [high_1 ^ c[1] ^ k[0], low_1, high_0 ^ c[3] ^ k[1], low_0]
    return torch.stack(c, 1)


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The upper and lower 64 bits of an unsigned product, of 32-bit halves, as torch has no unsigned 64-bit integers."""
    a_low, a_high, b_low, b_high = a & LOW, (a >> 32) & LOW, b & LOW, b >> 32
    middle = a_high * b_low + ((a_low * b_low >> 32) & LOW)
    other = a_low * b_high + (middle & LOW)
    return a_high * b_high + ((middle >> 32) & LOW) + ((other >> 32) & LOW), a * _signed(b)


def _signed(word: int) -> int:
    """The int64 of the same bits as an unsigned word."""
    return word - 2**64 if word >= 2**63 else word


@lru_cache(256)
def _halves(seed: int, stream: str, device: str) -> Tensor:
    """The key's two words, int64. Kept, as a copy to a GPU waits for all that the GPU has to do."""
    key = key_of(seed, stream)
    return torch.tensor([_signed(key & 2**64 - 1), _signed(key >> 64)], device=device)


@cache
def _compiled() -> Any:
    """`philox` as one kernel instead of some hundred, where there is a compiler."""
    return philox if missing_compiler("cuda") else torch.compile(philox, dynamic=True)
