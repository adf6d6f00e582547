"""Samplers: from noise to a latent along the process's ODE, with a given number of network calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import expm1

import torch
from torch import Tensor

from nestgen.errors import UserError
from nestgen.process import STEPS, Process

# eps(z_BCHW, told_B): the noise in z, guidance included, when the network is told these numbers.
Eps = Callable[[Tensor, Tensor], Tensor]
# eps(z_BCHW, t): the same at one time t of the process.
EpsAt = Callable[[Tensor, Tensor], Tensor]


def sample_level(
    eps: Eps,
    process: Process,
    noise_BCHW: Tensor,
    steps: int,
    sampler: str,
    progress: Callable[[], object] = lambda: None,
) -> Tensor:
    """The latent that standard normal noise flows to at the process's first time, in `steps` calls of `eps`.

    `sampler` is one of SAMPLERS; `progress` is called after each network call.
    """

    def eps_at(z_BCHW: Tensor, t: Tensor) -> Tensor:
        eps_BCHW = eps(z_BCHW, process.told(t).to(z_BCHW.device).expand(len(z_BCHW)))
        progress()
        return eps_BCHW

    return SAMPLERS[sampler](eps_at, process, noise_BCHW, steps)


def time_grid(process: Process, steps: int) -> Tensor:
    """Times (steps + 1) from 1 down to the process's first, float64, spaced as U-ViT does: evenly in t for the
    discrete process, evenly in log-SNR for `vp`.
    """
    if process.kind == "discrete":
        return torch.linspace(1.0, process.first, steps + 1, dtype=torch.float64)
    start, end = process.half_log_snr(torch.tensor([1.0, process.first], dtype=torch.float64)).tolist()
    return process.time_of(torch.linspace(start, end, steps + 1, dtype=torch.float64))


def orders(steps: int) -> list[int]:
    """Orders of the single steps that spend `steps` calls: threes, and at least one lower order at the end.

    50 is 16 threes and a two; 6 is a three, a two and a one. As method `fast` of U-ViT's dpm_solver_pp.py.
    """
    threes, rest = divmod(steps, 3)
    return [3] * threes + [rest] if rest else [3] * (threes - 1) + [2, 1]


def _dpm_solver_pp_single(eps: EpsAt, process: Process, z: Tensor, steps: int) -> Tensor:
    """DPM-Solver++ in single steps of order 3 (Lu et al. 2022, arXiv 2211.01095), U-ViT's sampler.

    The ODE from time s to t is z_t = sigma_t / sigma_s z_s + alpha_t * (integral of e^(lambda - lambda_t) x over
    lambda from s to t), with x the predicted latent. A step of order n spans n intervals of the time grid, calls
    the network once on each, and models x as a polynomial. The last latent is not denoised once more.
    """
    times = time_grid(process, steps)
    alpha, sigma, lam = (f(times).tolist() for f in (process.alpha, process.sigma, process.half_log_snr))

    def predict(z: Tensor, i: int) -> Tensor:
        return (z - sigma[i] * eps(z, times[i])) / alpha[i]

    def first_order(z: Tensor, x: Tensor, i: int, j: int) -> Tensor:
        return sigma[j] / sigma[i] * z - alpha[j] * expm1(lam[i] - lam[j]) * x

    i = 0
    for order in orders(steps):
        end = i + order
        h = lam[end] - lam[i]
        x_0 = predict(z, i)
        z_end = first_order(z, x_0, i, end)
        if order > 1:
            r_1 = (lam[i + 1] - lam[i]) / h
            x_1 = predict(first_order(z, x_0, i, i + 1), i + 1)
        if order == 2:
            z_end = z_end - 0.5 / r_1 * alpha[end] * expm1(-h) * (x_1 - x_0)
        if order == 3:
            r_2 = (lam[i + 2] - lam[i]) / h
            z_2 = first_order(z, x_0, i, i + 2) + r_2 / r_1 * alpha[i + 2] * _phi_2(r_2 * h) * (x_1 - x_0)
            x_2 = predict(z_2, i + 2)
            z_end = z_end + alpha[end] * _phi_2(h) / r_2 * (x_2 - x_0)
        z, i = z_end, end
    return z


def _phi_2(h: float) -> float:
    """(e^-h - 1) / h + 1, the weight of the slope of x."""
    return expm1(-h) / h + 1


def _dpm_solver_pp_multi(eps: EpsAt, process: Process, z: Tensor, steps: int, order: int) -> Tensor:
    """DPM-Solver++ in multisteps, of diffusers. Order 1 is DDIM (Lu et al. 2022, section 4.1).

    diffusers counts its 1000 times from 0, so its k is our t = (k + 1) / 1000. Left alone it would end at a
    noise of zero, where no network was trained, rather than at k = 0.
    """
    # Here, because diffusers takes seconds to import; the module, because diffusers' root hides its types.
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    if steps >= STEPS:
        raise UserError(f"sampling.steps is {steps}; this sampler takes {STEPS - 1} at most, dpm++-single more")
    times = torch.arange(1, STEPS + 1, dtype=torch.float64) / STEPS
    log_alpha = torch.cat([torch.zeros(1, dtype=torch.float64), process.log_alpha(times)])
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=STEPS,
        trained_betas=(-torch.expm1(2 * log_alpha.diff())).tolist(),
        solver_order=order,
        algorithm_type="dpmsolver++",
        final_sigmas_type="sigma_min",
        timestep_spacing="linspace",
    )
    scheduler.set_timesteps(steps)
    for k in scheduler.timesteps:
        z = scheduler.step(eps(z, times[k]), k, z, return_dict=False)[0]
    return z


SAMPLERS: dict[str, Callable[[EpsAt, Process, Tensor, int], Tensor]] = {
    "dpm++-single": _dpm_solver_pp_single,
    "dpm++-multi": partial(_dpm_solver_pp_multi, order=2),
    "ddim": partial(_dpm_solver_pp_multi, order=1),
}
