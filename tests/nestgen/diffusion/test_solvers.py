"""Samplers against the published algorithm, diffusers and the exact solution of the ODE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nestgen.diffusion.process import Process
from nestgen.diffusion.solvers import SAMPLERS, Denoise, orders, sample_level
from nestgen.errors import UserError

KINDS = ("discrete", "vp")
Eps = Callable[[Tensor, Tensor], Tensor]  # what a network predicts of (z, the input of its time embedding)
TOLD_PER_T = {"discrete": 1000, "vp": 999}
END = {"discrete": 1 / 1000, "vp": 1e-4}  # the last time


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def network(z: Tensor, inputs: Tensor) -> Tensor:
    """A smooth eps that is neither linear in z nor in time."""
    t = (inputs / 1000)[:, None, None, None]
    return torch.tanh(z * (0.5 + t)) + 0.3 * torch.sin(3 * z + 2 * t) * (1 - t)


def denoise(eps: Eps, kind: str) -> Denoise:
    """The latent that a noise prediction says."""
    process = Process(kind)  # type: ignore[arg-type]

    def x(z: Tensor, t: Tensor) -> Tensor:
        inputs = process.time_embedding_input(t).expand(len(z))
        return (z - float(process.sigma(t)) * eps(z, inputs)) / float(process.alpha(t))

    return x


def draw(eps: Eps, kind: str, z: Tensor, steps: int, sampler: str) -> Tensor:
    return sample_level(denoise(eps, kind), Process(kind), z, steps, sampler)  # type: ignore[arg-type]


def schedule(kind: str) -> tuple[Callable[[float], float], Callable[[float], float], Callable[[float], float]]:
    """U-ViT's log alpha, sigma and lambda of a time, from their definitions."""
    n = np.arange(1, 1001)
    betas = np.linspace(np.sqrt(0.00085), np.sqrt(0.0120), 1000) ** 2
    table = np.log(np.cumprod(1 - betas)) / 2

    def log_alpha(t: float) -> float:
        if kind == "vp":
            return -(t**2) * 19.9 / 4 - t * 0.1 / 2
        return float(np.interp(t * 1000, n, table))

    def sigma(t: float) -> float:
        return float(np.sqrt(1 - np.exp(2 * log_alpha(t))))

    def lam(t: float) -> float:
        return log_alpha(t) - float(np.log(sigma(t)))

    return log_alpha, sigma, lam


def time_of(kind: str, goal: float) -> float:
    """The time of a lambda, by bisection: the inverse without its formula."""
    lam = schedule(kind)[2]
    low, high = END[kind], 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if lam(middle) < goal else (middle, high)
    return low


def plan(calls: int) -> list[int]:
    """Orders of method `fast`."""
    threes = calls // 3
    return {0: [3] * (threes - 1) + [2, 1], 1: [3] * threes + [1], 2: [3] * threes + [2]}[calls % 3]


def published(eps: Eps, kind: str, z: Tensor, calls: int) -> Tensor:
    """DPM-Solver++ `fast` of order 3 in plain float64, from the formulas of dpm_solver_pp.py."""
    log_alpha, sigma, lam = schedule(kind)

    def x(z: Tensor, t: float) -> Tensor:
        inputs = torch.full((len(z),), t * TOLD_PER_T[kind], dtype=torch.float64)
        return (z - sigma(t) * eps(z, inputs)) / np.exp(log_alpha(t))

    if kind == "discrete":
        times = list(np.linspace(1, 1 / 1000, calls + 1))
    else:
        times = [time_of(kind, goal) for goal in np.linspace(lam(1.0), lam(1e-4), calls + 1)]
    for order in plan(calls):
        s, *inner, t = times[: order + 1]
        times = times[order:]
        h = lam(t) - lam(s)
        alpha_t, phi_1 = np.exp(log_alpha(t)), np.exp(-h) - 1
        x_s = x(z, s)
        new = sigma(t) / sigma(s) * z - alpha_t * phi_1 * x_s
        if inner:
            r_1, alpha_1 = (lam(inner[0]) - lam(s)) / h, np.exp(log_alpha(inner[0]))
            z_1 = sigma(inner[0]) / sigma(s) * z - alpha_1 * (np.exp(-r_1 * h) - 1) * x_s
            x_1 = x(z_1, inner[0])
        if order == 2:
            new = new - 1 / (2 * r_1) * alpha_t * phi_1 * (x_1 - x_s)
        if order == 3:
            r_2, alpha_2 = (lam(inner[1]) - lam(s)) / h, np.exp(log_alpha(inner[1]))
            phi_12 = np.exp(-r_2 * h) - 1
            z_2 = sigma(inner[1]) / sigma(s) * z - alpha_2 * phi_12 * x_s
            z_2 = z_2 + r_2 / r_1 * alpha_2 * (phi_12 / (r_2 * h) + 1) * (x_1 - x_s)
            new = new + 1 / r_2 * alpha_t * (phi_1 / h + 1) * (x(z_2, inner[1]) - x_s)
        z = new
    return z


def published_dpm(eps: Eps, kind: str, z: Tensor, calls: int) -> Tensor:
    """DPM-Solver `fast` of order 3 in plain float64, from algorithms 1 and 2 of arXiv 2206.00927."""
    log_alpha, sigma, lam = schedule(kind)

    def told(z: Tensor, t: float) -> Tensor:
        return eps(z, torch.full((len(z),), t * TOLD_PER_T[kind], dtype=torch.float64))

    def moved(z: Tensor, s: float, t: float, noise: Tensor) -> Tensor:
        step = np.exp(lam(t) - lam(s)) - 1
        return np.exp(log_alpha(t) - log_alpha(s)) * z - sigma(t) * step * noise

    steps = plan(calls)
    ends = np.linspace(lam(1.0), lam(END[kind]), len(steps) + 1)
    for order, start, end in zip(steps, ends, ends[1:]):
        h = end - start
        s, t = time_of(kind, start), time_of(kind, end)
        noise_s = told(z, s)
        if order == 1:
            z = moved(z, s, t, noise_s)
        if order == 2:
            middle = time_of(kind, start + h / 2)
            change = told(moved(z, s, middle, noise_s), middle) - noise_s
            z = moved(z, s, t, noise_s) - sigma(t) * (np.exp(h) - 1) * change
        if order == 3:
            third, later = time_of(kind, start + h / 3), time_of(kind, start + 2 * h / 3)
            change = told(moved(z, s, third, noise_s), third) - noise_s
            inner = (np.exp(2 * h / 3) - 1) / (2 * h / 3) - 1
            change = told(moved(z, s, later, noise_s) - 2 * sigma(later) * inner * change, later) - noise_s
            z = moved(z, s, t, noise_s) - 3 / 2 * sigma(t) * ((np.exp(h) - 1) / h - 1) * change
    return z


def difference(a: Tensor, b: Tensor) -> float:
    """Relative L2."""
    return float((a - b).double().norm() / b.double().norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("calls", [1, 2, 3, 4, 20, 27, 50])
@pytest.mark.parametrize(("sampler", "algorithm"), [("dpm++-single", published), ("dpm-single", published_dpm)])
def test_single_step_is_the_published_algorithm(
    sampler: str, algorithm: Callable[[Eps, str, Tensor, int], Tensor], kind: str, calls: int
) -> None:
    z = noise(0, 8, 3, 4, 4)
    expected = algorithm(network, kind, z, calls)
    # 1e-6, not rounding: the network gets float32 times
    assert difference(draw(network, kind, z, calls, sampler), expected) < 1e-6
    in_float32 = draw(network, kind, z.float(), calls, sampler)
    assert in_float32.dtype == torch.float32
    assert difference(in_float32, expected) < 5e-6


def test_dpm_single_takes_17_equal_steps_of_log_snr() -> None:
    process, times = Process("vp"), []

    def record(z: Tensor, t: Tensor) -> Tensor:
        times.append(t)
        return z

    sample_level(record, process, noise(4, 2, 1, 2, 2), 50, "dpm-single")
    lam = process.half_log_snr(torch.stack(times)).numpy()
    step = np.diff(process.half_log_snr(torch.tensor([1.0, 1e-4], dtype=torch.float64)).numpy())[0] / 17
    np.testing.assert_allclose(np.diff(lam[::3]), step, rtol=1e-9)
    np.testing.assert_allclose(np.diff(lam[:49]), step / 3, rtol=1e-9)
    np.testing.assert_allclose(lam[49] - lam[48], step / 2, rtol=1e-9)  # the last step is of order 2


@pytest.mark.parametrize("kind", KINDS)
def test_dpm_single_converges_by_its_order(kind: str) -> None:
    mean = torch.tensor([0.7, -1.0], dtype=torch.float64)[:, None, None]
    std = torch.tensor([0.4, 1.5], dtype=torch.float64)[:, None, None]
    eps, solution = gaussian(kind, mean, std, END[kind])
    z = noise(2, 64, 2, 1, 1)
    # calls of 22, 44 and 88 steps; the last step of order 2 does not lower the order of the whole
    errors = [difference(draw(eps, kind, z, calls, "dpm-single"), solution(z)) for calls in (65, 131, 263)]
    found = [np.log2(one / other) for one, other in zip(errors, errors[1:])]
    assert all(2.8 < order < 3.5 for order in found), found


@pytest.mark.parametrize("seed", range(3))
def test_at_50_calls_of_vp_the_solver_of_the_latent_is_nearer(seed: int) -> None:
    """What docs/sampling.md says of `dpm++-single` beside `dpm-single`, whichever of them takes the 900 calls."""
    z = noise(seed, 8, 3, 4, 4)
    for reference in ("dpm-single", "dpm++-single"):
        exact = draw(network, "vp", z, 900, reference)
        latent, of_noise = (
            difference(draw(network, "vp", z, 50, one), exact) for one in ("dpm++-single", "dpm-single")
        )
        assert latent < of_noise < 0.01


# Where 999 is a multiple of the steps, diffusers' whole-numbered times are ours; elsewhere it rounds them.
DIFFUSERS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def by_diffusers(scheduler: Any, z: Tensor, times: Sequence[int]) -> Tensor:
    for k in times:
        eps = network(z, torch.full((len(z),), k + 1.0))  # diffusers counts times from 0
        z = scheduler.step(eps, k, z, return_dict=False)[0]
    return z


def test_ddim_is_diffusers() -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**DIFFUSERS, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(27)  # fixes its stride at 37; 27 strides span 0..999
    z = noise(1, 4, 3, 4, 4)
    for name in ("ddim", "euler"):
        assert difference(draw(network, "discrete", z, 27, name), by_diffusers(scheduler, z, range(999, 0, -37))) < 1e-5


@pytest.mark.parametrize(("steps", "tolerance"), [(9, 5e-6), (27, 5e-6), (37, 5e-6), (50, 1e-4)])
def test_multistep_is_diffusers(steps: int, tolerance: float) -> None:
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        **DIFFUSERS, solver_order=2, final_sigmas_type="sigma_min", timestep_spacing="linspace"
    )
    scheduler.set_timesteps(steps)
    z = noise(2, 4, 3, 4, 4)
    assert (
        difference(draw(network, "discrete", z, steps, "dpm++-multi"), by_diffusers(scheduler, z, scheduler.timesteps))
        < tolerance
    )


def test_heun_is_karras_algorithm() -> None:
    """In y = z / alpha over s = sigma / alpha: d = (y - x) / s, then the mean of both ends' slopes."""
    process, z = Process("discrete"), noise(3, 4, 3, 4, 4)
    t = torch.linspace(1, 1 / 1000, 16, dtype=torch.float64)  # 29 calls: 14 steps of two, one of one
    s = (process.sigma(t) / process.alpha(t)).tolist()
    scale = [1 / np.sqrt(1 + one**2) for one in s]

    def slope(y: Tensor, i: int) -> Tensor:
        return network(scale[i] * y, (1000 * t[i]).float().expand(4))

    y = z / scale[0]
    for i in range(15):
        d = slope(y, i)
        end = y + (s[i + 1] - s[i]) * d
        y = y + (s[i + 1] - s[i]) * (d + slope(end, i + 1)) / 2 if i < 14 else end
    assert difference(draw(network, "discrete", z, 29, "heun"), scale[-1] * y) < 1e-6


def gaussian(kind: str, mean: Tensor, std: Tensor, last: float) -> tuple[Eps, Callable[[Tensor], Tensor]]:
    """Optimal eps for data N(mean, std²), and the exact solution from time 1 to `last`.

    z_t stays Gaussian with mean alpha m and variance alpha² std² + sigma²: the ODE only moves and stretches.
    """
    process = Process(kind)

    def moments(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma = process.alpha(t), process.sigma(t)
        return alpha * mean, sigma, alpha**2 * std**2 + sigma**2

    def eps(z: Tensor, inputs: Tensor) -> Tensor:
        centre, sigma, variance = moments(inputs.double()[:, None, None, None] / TOLD_PER_T[kind])
        return sigma * (z - centre) / variance

    def solution(z: Tensor) -> Tensor:
        start, _, variance = moments(torch.ones(1, 1, 1))
        end, _, variance_end = moments(torch.full((1, 1, 1), last, dtype=torch.float64))
        return end + (variance_end / variance).sqrt() * (z - start)

    return eps, solution


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("sampler", "error_at_50"),
    [
        ("dpm-single", 0.01),
        ("dpm++-single", 0.01),
        ("dpm++-multi", 0.03),
        ("unipc", 0.03),
        ("ddim", 0.05),
        ("heun", 0.03),
    ],
)
def test_converges_to_the_exact_solution(kind: str, sampler: str, error_at_50: float) -> None:
    mean = torch.tensor([0.7, -1.0], dtype=torch.float64)[:, None, None]
    std = torch.tensor([0.4, 1.5], dtype=torch.float64)[:, None, None]
    last = 1 / 1000 if sampler == "unipc" else Process(kind).end_time  # diffusers' grid ends at 1/1000
    eps, solution = gaussian(kind, mean, std, last)
    z = noise(2, 64, 2, 1, 1)
    exact = solution(z)
    errors = [difference(draw(eps, kind, z, steps, sampler), exact) for steps in (5, 14, 50, 200)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < error_at_50
    assert errors[3] < errors[2] / 3


@given(steps=st.integers(1, 300))
def test_orders_spend_exactly_the_calls(steps: int) -> None:
    assert sum(orders(steps)) == steps
    assert orders(steps) == sorted(orders(steps), reverse=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_calls_the_network_as_often_as_asked(kind: str, sampler: str, steps: int) -> None:
    times: list[float] = []
    calls: list[int] = []

    def record(z: Tensor, t: Tensor) -> Tensor:
        assert t.shape == ()
        times.append(float(t))
        return z

    z = sample_level(record, Process(kind), noise(4, 2, 1, 2, 2), steps, sampler, lambda call, t, x: calls.append(call))
    assert z.isfinite().all()
    assert calls == list(range(steps))
    assert len(times) == steps
    assert times == sorted(times, reverse=True)
    assert times[0] == pytest.approx(1)


def test_the_network_is_told_u_vits_labels() -> None:
    inputs: list[float] = []

    def record(z: Tensor, time: Tensor) -> Tensor:
        inputs.append(float(time[0]))
        return z

    for sampler in ("dpm++-single", "dpm++-multi", "ddim"):
        inputs.clear()
        draw(record, "discrete", noise(5, 1, 1, 1, 1), 50, sampler)
        assert inputs == pytest.approx([1000 - 19.98 * i for i in range(50)], rel=1e-6)  # fractional, 1-based
    inputs.clear()
    draw(record, "discrete", noise(5, 1, 1, 1, 1), 27, "unipc")
    assert inputs == [1000 - 37 * i for i in range(27)]  # diffusers' 999, 962, ... are one less


def test_more_steps_than_the_grid_has_are_refused() -> None:
    with pytest.raises(UserError, match="999 at most"):
        draw(network, "discrete", noise(6, 1, 1, 1, 1), 1000, "unipc")
