"""Averages of the weights over a training: the one that is sampled from, and snapshots for any other afterwards.

Post-hoc EMA is of Karras et al. 2023 (arXiv 2312.02696, section 3.1 and appendix C). A power-function average of
exponent gamma at step t weighs the weights of step tau by

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1),        0 <= tau <= t,

whose standard deviation is a fixed share of t, its length. A training has two such averages and saves them at
regular steps; any other length is approximated by a linear combination of the snapshots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LENGTHS = (0.05, 0.10)  # of the two averages of a training, as shares of its steps so far
LONGEST = 0.288  # the plain mean of all steps, a little less than 12^(-1/2)


def decay(ema: float, step: int) -> float:
    """Decay of the usual average at the optimiser step that follows `step` steps.

    (1 + step) / (10 + step) up to `ema`, so that a short run forgets its start.
    """
    return min(ema, (1 + step) / (10 + step))


def power_decay(length: float, step: int) -> float:
    """Decay of the power-function average at the same step: (1 - 1 / t)^(gamma + 1) with t = step + 1."""
    return (1 - 1 / (step + 1)) ** (exponent(length) + 1)


def exponent(length: float) -> float:
    """gamma of a length: (gamma + 1)^(1/2) (gamma + 2)^-1 (gamma + 3)^(-1/2), solved for gamma.

    Lengths lie between 0 and LONGEST, at which gamma is 0.
    """
    # (g + 1) = length^2 (g + 2)^2 (g + 3) is a cubic; its largest real root is the one above -1
    s = length**-2
    roots = np.roots([1, 7, 16 - s, 12 - s])
    return float(roots[np.isreal(roots)].real.max())


@dataclass(frozen=True)
class Profile:
    """A power-function average: its length, and the step at which it is taken."""

    step: int
    length: float


def _product(one: Profile, other: Profile) -> float:
    """The integral of the product of two profiles."""
    a, b = exponent(one.length), exponent(other.length)
    # in logarithms: steps to the power of hundreds
    log = (
        math.log((a + 1) * (b + 1) / (a + b + 1))
        + (a + b + 1) * math.log(min(one.step, other.step))
        - (a + 1) * math.log(one.step)
        - (b + 1) * math.log(other.step)
    )
    return math.exp(log)


def combination(snapshots: Sequence[Profile], target: Profile) -> np.ndarray:
    """Factors of the snapshots whose weighted sum is nearest to a target average, in the least squares of their profiles.

    Their sum is 1, which least squares alone miss with few snapshots: it would scale all weights.
    """
    gram = np.array([[_product(one, other) for other in snapshots] for one in snapshots])
    right = np.array([_product(one, target) for one in snapshots])
    factors = np.linalg.lstsq(gram, right, rcond=None)[0]
    return factors / factors.sum()
