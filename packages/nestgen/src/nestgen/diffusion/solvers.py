"""Samplers: from noise to a latent along the process's ODE, with a given number of network calls.

All solve the same ODE from time 1 to the process's `end_time`. They see the network only through x(z, t), the latent it
predicts from z at time t, guidance included, so they serve networks that predict noise, velocity or anything else.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from math import expm1

import torch
from torch import Tensor

from nestgen.diffusion.process import STEPS, Process
from nestgen.errors import UserError

# x(z_BCHW, t): the latent (B, C, H, W) predicted at one time t, a float64 scalar tensor on the CPU.
Denoise = Callable[[Tensor, Tensor], Tensor]


def sample_level(
    denoise: Denoise,
    process: Process,
    noise_BCHW: Tensor,
    steps: int,
    sampler: str,
    callback: Callable[[int, float, Tensor], object] = lambda call, t, x_BCHW: None,
) -> Tensor:
    """The latent that standard normal noise flows to at the process's `end_time`, in `steps` calls of `denoise`.

    `sampler` is one of SAMPLERS; `callback` gets the number of each call, from 0, its time and the latent it predicted.
    """
    calls = count()

    def counted(z_BCHW: Tensor, t: Tensor) -> Tensor:
        x_BCHW = denoise(z_BCHW, t)
        callback(next(calls), float(t), x_BCHW)
        return x_BCHW

    return SAMPLERS[sampler](counted, process, noise_BCHW, steps)


def time_grid(process: Process, steps: int) -> Tensor:
    """Times (steps + 1) from 1 down to the process's `end_time`, float64, spaced as U-ViT does: evenly in log-SNR for
    `vp`, evenly in t for the others.
    """
    if process.kind != "vp":
        return torch.linspace(1.0, process.end_time, steps + 1, dtype=torch.float64)
    return process.time_of(_log_snr_grid(process, steps))


def _log_snr_grid(process: Process, steps: int) -> Tensor:
    """Equal steps (steps + 1) of lambda, half the log-SNR, from time 1 to the process's `end_time`, float64."""
    start, end = process.half_log_snr(torch.tensor([1.0, process.end_time], dtype=torch.float64)).tolist()
    return torch.linspace(start, end, steps + 1, dtype=torch.float64)


def orders(steps: int) -> list[int]:
    """Orders of the single steps that spend `steps` calls: threes, and at least one lower order at the end.

    50 is 16 threes and a two; 6 is a three, a two and a one. As `fast` of U-ViT's dpm_solver_pp.py and
    dpm_solver_pytorch.py.
    """
    threes, rest = divmod(steps, 3)
    return [3] * threes + [rest] if rest else [3] * (threes - 1) + [2, 1]


def _dpm_solver_pp_single(denoise: Denoise, process: Process, z: Tensor, steps: int) -> Tensor:
    """DPM-Solver++ in single steps of order 3 (Lu et al. 2022, arXiv 2211.01095), U-ViT's sampler on COCO.

    A step of order n spans n intervals of the time grid. The last latent is not denoised once more.
    """
    times = time_grid(process, steps)
    alpha, sigma, lam = process.alpha(times), process.sigma(times), process.half_log_snr(times)

    def latent(z: Tensor, i: int) -> Tensor:
        return denoise(z, times[i])

    return _single_steps(latent, alpha.tolist(), sigma.tolist(), lam.tolist(), z, orders(steps))


def _dpm_solver_single(denoise: Denoise, process: Process, z: Tensor, steps: int) -> Tensor:
    """DPM-Solver in single steps of order 3 (Lu et al. 2022, arXiv 2206.00927), U-ViT's sampler on ImageNet.

    As above with the predicted noise in place of the latent. All steps are equally long in lambda, also those of lower
    order, and a step of order n calls the network at its start and at each further n-th of it.
    """
    plan = orders(steps)
    grid = _log_snr_grid(process, len(plan)).tolist()
    parts = [
        torch.linspace(start, end, order + 1, dtype=torch.float64)[:-1]
        for start, end, order in zip(grid, grid[1:], plan)
    ]
    lam = torch.cat([*parts, torch.tensor(grid[-1:], dtype=torch.float64)])
    times = process.time_of(lam)
    alpha, sigma = process.alpha(times).tolist(), process.sigma(times).tolist()

    def noise(z: Tensor, i: int) -> Tensor:
        return (z - alpha[i] * denoise(z, times[i])) / sigma[i]

    return _single_steps(noise, sigma, alpha, (-lam).tolist(), z, plan)


def _single_steps(
    predict: Callable[[Tensor, int], Tensor],
    weight: list[float],
    other: list[float],
    rate: list[float],
    z: Tensor,
    plan: list[int],
) -> Tensor:
    """Single steps of the orders in `plan`; `predict(z, i)` calls the network at point i of the grid.

    The ODE from s to t is z_t = other_t / other_s z_s + weight_t * (integral of e^(rate - rate_t) p over rate from s
    to t), with p the predicted latent for (weight, other, rate) = (alpha, sigma, lambda), and the predicted noise for
    (sigma, alpha, -lambda). A step of order n has n points of the grid and models p as a polynomial.
    """

    def first_order(z: Tensor, p: Tensor, i: int, j: int) -> Tensor:
        return other[j] / other[i] * z - weight[j] * expm1(rate[i] - rate[j]) * p

    i = 0
    for order in plan:
        end = i + order
        h = rate[end] - rate[i]
        p_0 = predict(z, i)
        z_end = first_order(z, p_0, i, end)
        if order > 1:
            r_1 = (rate[i + 1] - rate[i]) / h
            p_1 = predict(first_order(z, p_0, i, i + 1), i + 1)
        if order == 2:
            z_end = z_end - 0.5 / r_1 * weight[end] * expm1(-h) * (p_1 - p_0)
        if order == 3:
            r_2 = (rate[i + 2] - rate[i]) / h
            z_2 = first_order(z, p_0, i, i + 2) + r_2 / r_1 * weight[i + 2] * _phi_2(r_2 * h) * (p_1 - p_0)
            p_2 = predict(z_2, i + 2)
            z_end = z_end + weight[end] * _phi_2(h) / r_2 * (p_2 - p_0)
        z, i = z_end, end
    return z


def _phi_2(h: float) -> float:
    """(e^-h - 1) / h + 1, the weight of the prediction's slope."""
    return expm1(-h) / h + 1


def _dpm_solver_pp_multi(denoise: Denoise, process: Process, z: Tensor, steps: int) -> Tensor:
    """DPM-Solver++ in multisteps of order 2 ("2M"): x is a line through this call's and the one's before.

    The first step is of order 1, and so is the last of fewer than 15, as in the published code.
    """
    times = time_grid(process, steps)
    alpha, sigma, lam = (f(times).tolist() for f in (process.alpha, process.sigma, process.half_log_snr))
    before = z
    for i in range(steps):
        x = denoise(z, times[i])
        h = lam[i + 1] - lam[i]
        line = x
        if 0 < i < (steps - 1 if steps < 15 else steps):
            line = x + 0.5 * h / (lam[i] - lam[i - 1]) * (x - before)
        z = sigma[i + 1] / sigma[i] * z - alpha[i + 1] * expm1(-h) * line
        before = x
    return z


def _straight(denoise: Denoise, process: Process, z: Tensor, steps: int, heun: int) -> Tensor:
    """`heun` steps of Heun's method, two calls each, then steps of Euler's for the other calls.

    In y = z / c over s = sigma / c the ODE is dy/ds = (y - x) / s: with c = alpha this is the noise (Karras et al.
    2022, arXiv 2206.00364), and where alpha + sigma = 1, with c = 1, the velocity. Euler's method there is DDIM.
    """
    times = time_grid(process, steps - heun)
    alpha, sigma = process.alpha(times), process.sigma(times)
    c = torch.ones_like(alpha) if process.kind == "flow" else alpha
    s, scale = (sigma / c).tolist(), c.tolist()

    def slope(y: Tensor, i: int) -> Tensor:
        return (y - denoise(scale[i] * y, times[i])) / s[i]

    y = z / scale[0]
    for i in range(steps - heun):
        d = slope(y, i)
        end = y + (s[i + 1] - s[i]) * d
        y = y + (s[i + 1] - s[i]) * (d + slope(end, i + 1)) / 2 if i < heun else end
    return scale[-1] * y


def _euler(denoise: Denoise, process: Process, z: Tensor, steps: int) -> Tensor:
    """DDIM (Song et al. 2020, arXiv 2010.02502), which for a flow is Euler's method in t."""
    return _straight(denoise, process, z, steps, 0)


def _heun(denoise: Denoise, process: Process, z: Tensor, steps: int) -> Tensor:
    """Heun's method, and Euler's for the last call or two: at sigma = 0 there is nothing to call."""
    return _straight(denoise, process, z, steps, (steps - 1) // 2)


def _unipc(denoise: Denoise, process: Process, z: Tensor, steps: int) -> Tensor:
    """UniPC of order 2 (Zhao et al. 2023, arXiv 2302.04867), of diffusers.

    diffusers counts its 1000 times from 0, so its k is our t = (k + 1) / 1000; fractions of a step do not exist
    there. Left alone it would end at a noise of zero, where no network was trained, rather than at k = 0.
    """
    # Here, because diffusers takes seconds to import; the module, because diffusers' root hides its types.
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    if steps >= STEPS:
        raise UserError(f"sampling.steps is {steps}; unipc takes {STEPS - 1} at most, the other samplers more")
    times = torch.arange(1, STEPS + 1, dtype=torch.float64) / STEPS
    log_alpha = torch.cat([torch.zeros(1, dtype=torch.float64), process.log_alpha(times)])
    scheduler = UniPCMultistepScheduler(
        num_train_timesteps=STEPS,
        trained_betas=(-torch.expm1(2 * log_alpha.diff())).tolist(),
        prediction_type="sample",
        final_sigmas_type="sigma_min",
        timestep_spacing="linspace",
    )
    scheduler.set_timesteps(steps)
    for k in scheduler.timesteps:
        z = scheduler.step(denoise(z, times[k]), k, z, return_dict=False)[0]
    return z


SAMPLERS: dict[str, Callable[[Denoise, Process, Tensor, int], Tensor]] = {
    "dpm-single": _dpm_solver_single,
    "dpm++-single": _dpm_solver_pp_single,
    "dpm++-multi": _dpm_solver_pp_multi,
    "unipc": _unipc,
    "ddim": _euler,
    "euler": _euler,
    "heun": _heun,
}
