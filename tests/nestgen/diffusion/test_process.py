"""The two processes against diffusers, the closed form and the known loss of Gaussian data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nestgen import randomness
from nestgen.diffusion.process import Process

KINDS: list[Any] = ["discrete", "vp", "flow"]
PREDICTIONS: list[Any] = ["eps", "v", "velocity", "x"]


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
@given(st.lists(st.floats(1e-3, 1 - 1e-9), min_size=1, max_size=20), st.sampled_from([1.0, 0.5, 3.0]))
@settings(deadline=None)
def test_identities(kind: Any, times: list[float], shift: float) -> None:
    process, t = Process(kind, shift=shift), torch.tensor(times, dtype=torch.float64)
    alpha, sigma = process.alpha(t), process.sigma(t)
    assert alpha.dtype == torch.float64
    power = 1 if kind == "flow" else 2
    torch.testing.assert_close(alpha**power + sigma**power, torch.ones_like(t))
    torch.testing.assert_close(process.half_log_snr(t), torch.log(alpha / sigma), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(process.time_of(process.half_log_snr(t)), t, rtol=1e-6, atol=1e-8)
    # shifted: the noise weighs so much more beside the signal
    plain = Process(kind)
    torch.testing.assert_close(sigma / alpha, shift * plain.sigma(t) / plain.alpha(t), rtol=1e-6, atol=0)


def test_flow_is_the_straight_path_and_its_shift_that_of_times() -> None:
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    flow, shifted = Process("flow"), Process("flow", shift=3.0)
    torch.testing.assert_close(flow.alpha(t), 1 - t)
    torch.testing.assert_close(flow.sigma(t), t)
    torch.testing.assert_close(shifted.sigma(t), 3 * t / (1 + 2 * t))
    torch.testing.assert_close(flow.time_embedding_input(t), (999 * t).float())


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_eps_and_latent_follow_from_every_prediction(kind: Any, prediction: Any) -> None:
    process = Process(kind, prediction, shift=1.5)
    z, eps = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    for t in (torch.tensor([0.01, 0.3, 0.7, 0.99], dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)):
        z_t, output = process.add_noise(z, eps, t), process.target(z, eps, t)
        torch.testing.assert_close(process.eps(output, z_t, t), eps)
        torch.testing.assert_close(process.latent(output, z_t, t), z)
    assert torch.equal(Process().target(z, eps, torch.tensor(0.5)), eps)


def test_times_of_training_and_what_the_network_is_told() -> None:
    u = torch.tensor([0.0, 0.0009999, 0.001, 0.5, 0.9999999], dtype=torch.float64)
    discrete, vp = Process("discrete"), Process("vp")
    assert discrete.time_embedding_input(discrete.training_time(u)).tolist() == [1, 1, 2, 501, 1000]
    torch.testing.assert_close(vp.time_embedding_input(vp.training_time(u)), (999 * u).float())
    # every n in 1..1000 comes out as an exact whole number
    inputs = discrete.time_embedding_input(
        discrete.training_time((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
    )
    torch.testing.assert_close(inputs, torch.arange(1, 1001).float(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_add_noise(kind: Any) -> None:
    process, t = Process(kind), torch.tensor([0.1, 0.9], dtype=torch.float64)
    z, eps = randomness.normal(0, "z", [0, 1], (3, 2, 2)), randomness.normal(0, "e", [0, 1], (3, 2, 2))
    found = process.add_noise(z, eps, t)
    assert found.dtype == torch.float32
    for i in range(2):
        wanted = process.alpha(t)[i].item() * z[i] + process.sigma(t)[i].item() * eps[i]
        torch.testing.assert_close(found[i], wanted)


@pytest.mark.parametrize("weighting", ["uniform", "min-snr"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_best_predictor_of_gaussian_data_has_the_known_loss(kind: Any, prediction: Any, weighting: Any) -> None:
    """z ~ N(0, s^2): y = a eps + b z is best predicted by Cov(y, z_t) / Var(z_t) z_t, with Var(y) - Cov^2 / Var(z_t) left.

    The loss's weights are computed here by their definition: min(SNR, 5) on the error of the latent.
    """
    if (kind, prediction) == ("flow", "eps"):
        return  # refused by the recipe
    process, s, n = Process(kind, prediction, weighting), 0.7, 100_000

    def known(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Slope of the best predictor, what it leaves, and the weight of that."""
        alpha, sigma = process.alpha(t), process.sigma(t)
        zero = 0 * t
        a, b = {"eps": (1 + zero, zero), "v": (alpha, -sigma), "velocity": (1 + zero, zero - 1), "x": (zero, 1 + zero)}[
            prediction
        ]
        covariance, variance = a * sigma + b * alpha * s**2, alpha**2 * s**2 + sigma**2
        left = a**2 + b**2 * s**2 - covariance**2 / variance
        latent_left = s**2 - (alpha * s**2) ** 2 / variance
        uniform = left / sigma.clamp(min=0.05) ** 2 if prediction == "x" else left
        weighted = torch.clamp((alpha / sigma) ** 2, max=5) * latent_left if weighting == "min-snr" else uniform
        return covariance / variance, left, weighted

    even = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # so that only z and eps are random
    t = process.training_time(even)
    z, eps = torch.randn(2, n, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    z = s * z
    best = known(t)[0].float()[:, None, None, None] * process.add_noise(z, eps, t)
    exact = known(t)[2].mean().item()
    found = process.loss(best, z, eps, t).item()
    assert found == pytest.approx(exact, rel=0.01)
    assert process.loss(0.9 * best, z, eps, t) > found < process.loss(1.1 * best, z, eps, t)


@pytest.mark.parametrize(("kind", "other"), [("flow", "velocity"), ("vp", "v")])
def test_the_loss_of_a_predicted_latent_is_that_of_the_velocity_it_implies(kind: Any, other: Any) -> None:
    """As long as sigma is 0.05 or more; below, less."""
    z, eps, said = torch.randn(3, 6, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, implied = Process(kind, "x"), Process(kind, other)
    for time in (0.2, 0.7, 0.99):
        t = torch.full((6,), time, dtype=torch.float64)
        alpha, sigma = x.alpha(t)[0], x.sigma(t)[0]
        z_t = x.add_noise(z, eps, t)
        noise_said = (z_t - alpha * said) / sigma
        velocity = noise_said - said if kind == "flow" else alpha * noise_said - sigma * said
        torch.testing.assert_close(x.loss(said, z, eps, t), implied.loss(velocity, z, eps, t), rtol=1e-4, atol=0)
    assert Process("flow", "x").weight(torch.tensor([0.0, 0.01, 0.05, 1.0])).tolist() == pytest.approx(
        [400, 400, 400, 1]
    )


@pytest.mark.parametrize("shift", [1.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_logit_normal_times_have_a_normal_log_of_noise_over_signal(kind: Any, shift: float) -> None:
    """Quantiles of log(sigma / alpha) - log(shift) are those of N(-0.3, 0.8), but for the rounding to 1000 steps."""
    process = Process(kind, shift=shift, logit_normal=(-0.3, 0.8))
    u = torch.tensor([0.02, 0.1587, 0.5, 0.8413, 0.98], dtype=torch.float64)
    t = process.training_time(u)
    normal = torch.tensor([-2.0537, -1, 0, 1, 2.0537], dtype=torch.float64)
    tolerance = 0.02 if kind == "discrete" else 1e-3  # half a step of 1000 is 0.015 where there is little noise
    torch.testing.assert_close(-process.half_log_snr(t) - math.log(shift), -0.3 + 0.8 * normal, rtol=0, atol=tolerance)
    ends = process.training_time(torch.tensor([0.0, 1 - 2**-24], dtype=torch.float64))
    assert ends.isfinite().all()
    assert 0 < ends[0] < ends[1] <= 1
    if kind == "flow":
        torch.testing.assert_close(t, torch.sigmoid(-0.3 + 0.8 * normal), rtol=0, atol=1e-3)


def test_loss_is_float32_whatever_comes_in() -> None:
    eps, t = torch.full((4, 1, 1, 1), 300.0), torch.full((4,), 0.5)
    value = Process().loss(torch.zeros(4, 1, 1, 1, dtype=torch.float16), eps, eps, t)  # 300^2 is beyond float16
    assert value.dtype == torch.float32
    assert math.isclose(value.item(), 90_000)


def test_weights_are_finite_at_the_ends() -> None:
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for kind in ("vp", "flow"):
        for prediction in PREDICTIONS[1:] if kind == "flow" else PREDICTIONS:
            assert Process(kind, prediction, "min-snr").weight(ends).isfinite().all()
