"""Averages of the weights: their lengths, and any length from snapshots of two."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from nestgen.errors import UserError
from nestgen.recipe.locations import run_dir
from nestgen.recipe.recipe import load_recipe
from nestgen.runs.checkpoint import load_denoiser
from nestgen.runs.ema import LENGTHS, LONGEST, Profile, combination, exponent, power_decay
from nestgen.runs.ema_snapshots import reconstruct
from nestgen.training.train import train


def followed(length: float, steps: int) -> np.ndarray:
    """The factor of each step's weights in an average, by the recursion of training itself."""
    factors = np.zeros(steps)
    for step in range(steps):
        decay = power_decay(length, step)
        factors *= decay
        factors[step] += 1 - decay
    return factors


@given(st.floats(0.01, LONGEST))
@settings(deadline=None)
def test_a_length_is_the_standard_deviation_of_the_profile(length: float) -> None:
    gamma = exponent(length)
    assert gamma > -1e-2
    tau = (np.arange(200_000) + 0.5) / 200_000
    p = (gamma + 1) * tau**gamma
    mean = (p * tau).mean()
    assert np.sqrt((p * (tau - mean) ** 2).mean()) == pytest.approx(length, rel=1e-3)


def test_training_follows_the_profile() -> None:
    for length in LENGTHS:
        gamma = exponent(length)
        factors = followed(length, 2000)
        assert factors.sum() == pytest.approx(1)
        tau = (np.arange(2000) + 0.5) / 2000
        wanted = (gamma + 1) * tau**gamma / 2000
        assert np.abs(factors - wanted).sum() < 0.02


@cache
def snapshots(steps: int, every: int) -> tuple[list[Profile], np.ndarray]:
    """What a training keeps, and the factor of each step's weights in each snapshot."""
    profiles = [Profile(step, kept) for kept in LENGTHS for step in range(every, steps + 1, every)]
    rows = [np.pad(followed(one.length, one.step), (0, steps - one.step)) for one in profiles]
    return profiles, np.array(rows)


@pytest.mark.parametrize("length", [0.04, 0.07, 0.12, 0.2])
def test_other_lengths_are_combinations_of_snapshots(length: float) -> None:
    """Against the average that a training of that length would have kept: the factors of all steps' weights."""
    steps = 1600
    profiles, rows = snapshots(steps, 100)
    found = combination(profiles, Profile(steps, length)) @ rows
    assert np.abs(found - followed(length, steps)).sum() < 0.06
    assert found.sum() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("every", "step", "length"), [(500, 1500, 0.2), (500, 1500, 0.03), (500, 1250, 0.05), (1500, 1500, 0.2)]
)
def test_few_snapshots_still_average(every: int, step: int, length: float) -> None:
    """What all snapshots have in common, as buffers are, stays as it is."""
    profiles, _ = snapshots(1500, every)
    assert combination(profiles, Profile(step, length)).sum() == pytest.approx(1, abs=1e-12)


def test_a_stored_length_is_itself(experiment: Callable[..., Path]) -> None:
    recipe = load_recipe(
        experiment(
            levels=({"shape": "4x4x3"},),
            training={
                "steps": 12,
                "batch": 4,
                "warmup": 2,
                "lr": 1e-3,
                "preview": 0,
                "ema_snapshots": 4,
                "checkpoint_every": 5,
            },
        )
    )
    train(recipe, 0)
    folder = run_dir(recipe, 0)
    snapshots = sorted(path.name for path in (folder / "snapshots").iterdir())
    assert snapshots == [f"{step:08d}-{length:g}.safetensors" for step in (4, 8, 12) for length in LENGTHS]

    made = reconstruct(recipe, 0, 0.05, "toy-0.05", step=8)
    assert made == recipe.root / "runs/toy-0.05/z0-top"
    denoiser, meta = load_denoiser(made)
    assert (meta["step"], meta["ema_length"]) == (8, 0.05)
    wanted = load_file(folder / "snapshots/00000008-0.05.safetensors")
    for name, value in denoiser.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-5)
    for length, step, name, says in [
        (0.3, None, "x", "--length is 0.3; give one between"),
        (0.1, 13, "x", r"step 13 is not within 4\.\.12"),
        (0.1, 3, "x", r"step 3 is not within 4\.\.12, the steps of the snapshots"),
        (0.1, None, "toy-0.05", "has a checkpoint; give another --name"),
    ]:
        with pytest.raises(UserError, match=says):
            reconstruct(recipe, 0, length, name, step)
    with pytest.raises(UserError, match=r"has no snapshots; train with training\.ema_snapshots"):
        reconstruct(recipe.model_copy(update={"name": "other"}), 0, 0.1, "x")
