"""Where the optimal denoiser is known: every sampler recovers a Gaussian through a hierarchy of three levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nestgen import randomness
from nestgen.denoiser.config import DenoiserConfig
from nestgen.denoiser.uvit import Outputs
from nestgen.diffusion.process import Process
from nestgen.recipe.level_sampling import LevelSampling
from nestgen.sampling.conditions import ImageConditions
from nestgen.sampling.descent import sample_images
from nestgen.sampling.trained import LevelSampler, TrainedDenoiser

D = 3  # channels of a level; every level is one place
IMAGES = 64
SIGMA = 0.5  # on a level before it conditions the one below
# z_2 ~ N(0, S_2); z_l = A_l z_{l+1} + m_l + noise of covariance S_l
rng = np.random.default_rng(0)
A = [rng.normal(size=(D, D)) * 0.7 for _ in range(2)]
M = [rng.normal(size=D) for _ in range(3)]
S = [(lambda f: f @ f.T + 0.2 * np.eye(D))(rng.normal(size=(D, D)) * 0.6) for _ in range(3)]


def marginals() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Means and covariances of the levels, z_0 first."""
    mean, covariance = [M[2]], [S[2]]
    for level in (1, 0):
        mean.insert(0, A[level] @ mean[0] + M[level])
        covariance.insert(0, A[level] @ covariance[0] @ A[level].T + S[level])
    return mean, covariance


class Optimal(nn.Module):
    """E[output | z_t, noised level above] of the Gaussian hierarchy, in closed form and float64."""

    def __init__(self, level: int, process: Process) -> None:
        super().__init__()
        self.level, self.process = level, process
        self.config = DenoiserConfig((1, 1, D), 1, 8, 2, 1, () if level == 2 else ((1, 1, D),))
        self.pos_embed = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def prepare(self, batch: int, condition: Any, *further: Any) -> Any:
        """The condition, as nothing is to be computed of it."""
        return condition

    def forward(self, z: Tensor, told: Tensor, conditioning: Any = None, **given: Any) -> Outputs:
        t = told[0].double() / (1000 if self.process.kind == "discrete" else 999)
        mean, covariance = self.posterior(conditioning, len(z))
        alpha, sigma = float(self.process.alpha(t)), float(self.process.sigma(t))
        gain = alpha * covariance @ np.linalg.inv(alpha**2 * covariance + sigma**2 * np.eye(D))
        z_BD = z.flatten(1).numpy()
        latent_BD = mean + (z_BD - alpha * mean) @ gain.T
        if self.process.kind == "flow":
            output = latent_BD if sigma == 0 else (z_BD - latent_BD) / sigma  # eps - z
        else:
            output = (z_BD - alpha * latent_BD) / sigma
        return Outputs(torch.from_numpy(output).view_as(z))

    def posterior(self, condition: Any, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Of z_l given the level above plus SIGMA noise."""
        means, covariances = marginals()
        if self.level == 2:
            return np.tile(means[2], (batch, 1)), covariances[2]
        noised_BD = condition[0].flatten(1).numpy()
        a, above = A[self.level], covariances[self.level + 1]
        gain = above @ np.linalg.inv(above + SIGMA**2 * np.eye(D))
        mean = means[self.level] + (noised_BD - means[self.level + 1]) @ (a @ gain).T
        return mean, S[self.level] + a @ (above - gain @ above) @ a.T


@pytest.fixture(autouse=True)
def exact_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise whose sample moments are exactly those of independent normals, so that no error is one of chance."""
    streams = ["sample/z0", "sample/z1", "sample/z2", "sample/condition/z1", "sample/condition/z2"]
    raw = np.random.default_rng(1).normal(size=(IMAGES, D * len(streams)))
    white = np.linalg.qr(raw - raw.mean(0))[0] * np.sqrt(IMAGES - 1)

    def normal(seed: int, stream: str, index: Sequence[int], shape: Sequence[int]) -> Tensor:
        first = D * streams.index(stream)
        return torch.from_numpy(white[list(index), first : first + D]).view(len(index), *shape)

    monkeypatch.setattr(randomness, "normal", normal)


def hierarchy(kind: str, sampler: str, steps: int) -> tuple[LevelSampler, ...]:
    process = Process(kind, "velocity" if kind == "flow" else "eps")  # type: ignore[arg-type]
    samplers = []
    for level in range(3):
        trained = TrainedDenoiser(Optimal(level, process), process, {}, "")  # type: ignore[arg-type]
        sigmas = () if level == 2 else (SIGMA,)
        samplers.append(LevelSampler(level, trained, LevelSampling(sampler, steps, None, None, sigmas)))
    return tuple(samplers)


def drawn(kind: str, sampler: str, steps: int) -> np.ndarray:
    return sample_images(hierarchy(kind, sampler, steps), range(IMAGES), ImageConditions(0))[0].flatten(1).numpy()


def solution(kind: str) -> np.ndarray:
    """z_0 by the ODE's exact solution at each level, from the same noise.

    z_t stays Gaussian with covariance V = alpha^2 S + sigma^2, so from time 1 to the last it only moves and
    stretches: alpha m + V^(1/2) V_1^(-1/2) (z - alpha_1 m).
    """
    above = None
    for level in (2, 1, 0):
        optimal = hierarchy(kind, "ddim", 1)[level].trained.denoiser
        process = optimal.process
        condition = None
        if above is not None:
            noised = above + SIGMA * randomness.normal(0, f"sample/condition/z{level + 1}", range(IMAGES), (D,)).numpy()
            condition = (torch.from_numpy(noised),)
        mean, covariance = optimal.posterior(condition, IMAGES)
        values, vectors = np.linalg.eigh(covariance)
        times = torch.tensor([1.0, process.end_time], dtype=torch.float64)
        (a_1, a_0), (s_1, s_0) = process.alpha(times).tolist(), process.sigma(times).tolist()
        stretch = np.sqrt((a_0**2 * values + s_0**2) / (a_1**2 * values + s_1**2))
        z = randomness.normal(0, f"sample/z{level}", range(IMAGES), (D,)).numpy()
        above = a_0 * mean + (z - a_1 * mean) @ (vectors * stretch) @ vectors.T
    assert above is not None
    return above


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# Relative error of z_0 after 50 calls a level.
CASES = {
    ("discrete", "dpm++-single"): 0.01,
    ("discrete", "dpm++-multi"): 0.01,
    ("discrete", "unipc"): 0.01,
    ("discrete", "ddim"): 0.04,
    ("discrete", "heun"): 0.02,
    ("vp", "dpm-single"): 0.002,
    ("vp", "dpm++-single"): 0.002,
    ("vp", "dpm++-multi"): 0.01,
    ("flow", "euler"): 0.04,
    ("flow", "heun"): 0.002,
}


@pytest.mark.parametrize(("kind", "sampler"), CASES)
def test_every_sampler_converges_through_the_hierarchy(kind: str, sampler: str) -> None:
    exact = solution(kind)
    found = [relative(drawn(kind, sampler, steps), exact) for steps in (5, 15, 50)]
    assert found == sorted(found, reverse=True)
    assert found[2] < CASES[kind, sampler]
    assert found[2] < found[0] / 5


@pytest.mark.parametrize(
    ("kind", "sampler", "of_mean", "of_covariance"),
    [
        ("discrete", "dpm++-single", 0.1, 0.3),
        ("vp", "dpm-single", 0.01, 0.03),
        ("vp", "dpm++-single", 0.01, 0.03),
        ("flow", "heun", 0.001, 0.003),
    ],
)
def test_mean_and_covariance_are_recovered(kind: str, sampler: str, of_mean: float, of_covariance: float) -> None:
    """What stays at 50 calls is the process's: sampling starts from noise alone, where alpha is 0.068 for `discrete`,
    0.0066 for `vp` and 0 for `flow`, and each level's mean given the one above comes out shorter by that.
    """
    z_0 = drawn(kind, sampler, 50)
    mean, covariance = (values[0] for values in marginals())
    error = np.linalg.norm(z_0.mean(0) - mean) / np.sqrt(np.trace(covariance))
    assert error < of_mean
    assert relative(np.cov(z_0, rowvar=False), covariance) < of_covariance
    few = drawn(kind, sampler, 5)
    assert relative(np.cov(few, rowvar=False), np.cov(solution(kind), rowvar=False)) > 0.02  # and it shrinks from there
