"""The two processes against diffusers, the closed form and the known loss of Gaussian data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from nestgen import noise
from nestgen.process import Process, loss

KINDS: list[Any] = ["discrete", "vp"]


def test_discrete_tables_are_diffusers() -> None:
    scheduler = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear")
    alphas = Process("discrete").alpha(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    torch.testing.assert_close(alphas**2, scheduler.alphas_cumprod.double(), rtol=2e-6, atol=0)
    assert (alphas[-1] ** 2).item() == pytest.approx(0.00466, abs=1e-5)


def test_vp_is_the_integral_of_beta() -> None:
    """log alpha(t) = -1/2 of the integral of beta(s) = 0.1 + 19.9 s over 0..t."""
    for t in (0.001, 0.3, 1.0):
        s = np.linspace(0, t, 200_001)
        integral = np.trapezoid(0.1 + 19.9 * s, s)
        assert Process("vp").log_alpha(torch.tensor([t], dtype=torch.float64)).item() == pytest.approx(
            -integral / 2, rel=1e-9
        )


def test_fractional_times_are_interpolated_in_log_alpha() -> None:
    process = Process("discrete")
    low, high = process.log_alpha(torch.tensor([0.020, 0.021], dtype=torch.float64))
    assert process.log_alpha(torch.tensor([0.02025], dtype=torch.float64)).item() == pytest.approx(
        (0.75 * low + 0.25 * high).item(), rel=1e-12
    )


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.floats(1e-3, 1), min_size=1, max_size=20))
def test_identities(kind: Any, times: list[float]) -> None:
    process, t = Process(kind), torch.tensor(times, dtype=torch.float64)
    alpha, sigma = process.alpha(t), process.sigma(t)
    assert alpha.dtype == torch.float64
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t))
    torch.testing.assert_close(process.half_log_snr(t), torch.log(alpha / sigma))
    torch.testing.assert_close(process.time_of(process.half_log_snr(t)), t, rtol=1e-7, atol=1e-9)


def test_times_of_training_and_what_the_network_is_told() -> None:
    u = torch.tensor([0.0, 0.0009999, 0.001, 0.5, 0.9999999], dtype=torch.float64)
    discrete, vp = Process("discrete"), Process("vp")
    assert discrete.told(discrete.time(u)).tolist() == [1, 1, 2, 501, 1000]
    torch.testing.assert_close(vp.told(vp.time(u)), (999 * u).float())
    # every n in 1..1000 comes out as an exact whole number
    told = discrete.told(discrete.time((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000))
    torch.testing.assert_close(told, torch.arange(1, 1001).float(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_add_noise(kind: Any) -> None:
    process, t = Process(kind), torch.tensor([0.1, 0.9], dtype=torch.float64)
    z, eps = noise.normal(0, "z", [0, 1], (3, 2, 2)), noise.normal(0, "e", [0, 1], (3, 2, 2))
    found = process.add_noise(z, eps, t)
    assert found.dtype == torch.float32
    for i in range(2):
        wanted = process.alpha(t)[i].item() * z[i] + process.sigma(t)[i].item() * eps[i]
        torch.testing.assert_close(found[i], wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_predictor_of_gaussian_data_has_the_known_loss(kind: Any) -> None:
    """z ~ N(0, s^2): E[eps | z_t] = sigma z_t / (alpha^2 s^2 + sigma^2), which leaves alpha^2 s^2 of the same."""
    process, s, n = Process(kind), 0.7, 20_000
    t = process.time(noise.uniform(0, "t", range(n), ()))
    z, eps = s * noise.normal(0, "z", range(n), (1, 2, 2)), noise.normal(0, "eps", range(n), (1, 2, 2))
    alpha, sigma = process.alpha(t), process.sigma(t)
    scale = alpha**2 * s**2 + sigma**2
    best = (sigma / scale).float()[:, None, None, None] * process.add_noise(z, eps, t)
    grid = process.time((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)
    known = (process.alpha(grid) ** 2 * s**2 / (process.alpha(grid) ** 2 * s**2 + process.sigma(grid) ** 2)).mean()
    assert loss(best, eps).item() == pytest.approx(known.item(), rel=0.02)
    assert loss(0.9 * best, eps) > loss(best, eps) < loss(1.1 * best, eps)


def test_loss_is_float32_whatever_comes_in() -> None:
    eps = torch.full((4, 1, 1, 1), 300.0)
    value = loss(torch.zeros(4, 1, 1, 1, dtype=torch.float16), eps)  # 300^2 is beyond float16
    assert value.dtype == torch.float32
    assert math.isclose(value.item(), 90_000)
