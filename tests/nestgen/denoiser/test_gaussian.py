"""The linear part of a denoiser: what a joint Gaussian says, and that it is fitted, kept and used everywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from nestgen.denoiser.config import DenoiserConfig
from nestgen.denoiser.uvit import Denoiser
from nestgen.diffusion.guidance import GuidedDenoiser
from nestgen.diffusion.process import Process, level_process
from nestgen.errors import UserError
from nestgen.recipe.level_sampling import LevelSampling
from nestgen.recipe.locations import run_dir
from nestgen.recipe.recipe import Recipe, load_recipe
from nestgen.runs.checkpoint import newest
from nestgen.stores.store import open_store
from nestgen.training.batches import make_batch, open_training_data
from nestgen.training.moments import fit_gaussian
from nestgen.training.step import Trainer
from nestgen.training.train import train
from tests.nestgen.training_runs import parts

SHAPE, ABOVE = (2, 2, 2), ((1, 1, 3), (1, 1, 2))
D, K = 8, 5
NOISE_K = np.array([0.5] * 3 + [1.2] * 2)  # of the two levels above
rng = np.random.default_rng(0)
MEAN_J = rng.normal(size=D + K)
COVARIANCE_JJ = (lambda f: f @ f.T / 4)(rng.normal(size=(D + K, D + K)))


def untrained(kind: str, prediction: str) -> tuple[Denoiser, Process]:
    """A denoiser that has the linear part and nothing else yet."""
    config = DenoiserConfig(SHAPE, 1, 16, 2, 2, ABOVE, gaussian=True, side_head=True)
    denoiser = Denoiser(config).requires_grad_(False)
    denoiser.gaussian.fit(*map(torch.from_numpy, (MEAN_J, COVARIANCE_JJ, NOISE_K)))
    return denoiser, Process(kind, prediction)  # type: ignore[arg-type]


def regression(z_t_BD: np.ndarray, alpha: float, sigma: float, c_BK: np.ndarray | None) -> np.ndarray:
    """E[z | z_t, c] from the covariance of all that is seen; c = z' + noise."""
    seen = D if c_BK is None else D + K
    mean_S = np.concatenate([alpha * MEAN_J[:D], MEAN_J[D:]])[:seen]
    scale_S = np.concatenate([np.full(D, alpha), np.ones(K)])[:seen]
    noise_S = np.concatenate([np.full(D, sigma), NOISE_K])[:seen]
    covariance_SS = COVARIANCE_JJ[:seen, :seen] * np.outer(scale_S, scale_S) + np.diag(noise_S**2)
    across_DS = COVARIANCE_JJ[:D, :seen] * scale_S
    seen_BS = z_t_BD if c_BK is None else np.concatenate([z_t_BD, c_BK], 1)
    return MEAN_J[:D] + np.linalg.solve(covariance_SS, (seen_BS - mean_S).T).T @ across_DS.T


@pytest.mark.parametrize(
    ("kind", "prediction"), [("discrete", "eps"), ("discrete", "v"), ("vp", "x"), ("flow", "velocity")]
)
@pytest.mark.parametrize("guidance", [0.0, 0.7])
def test_untrained_it_is_the_regression_on_all_that_is_seen(kind: str, prediction: str, guidance: float) -> None:
    denoiser, process = untrained(kind, prediction)
    z_t_BD, c_BK = np.split(np.random.default_rng(1).normal(size=(6, D + K)), [D], 1)
    conditions = tuple(torch.from_numpy(c_BK).float().split((3, 2), 1))
    settings = LevelSampling("ddim", 1, guidance, None, (0.5, 1.2))
    guided = GuidedDenoiser(denoiser, process, settings, tuple(one[:, :, None, None] for one in conditions))
    for t in (0.1, 0.5, 0.9):
        time = torch.tensor(t, dtype=torch.float64)
        alpha, sigma = float(process.alpha(time)), float(process.sigma(time))
        found = guided(torch.from_numpy(z_t_BD).float().view(6, 2, 2, 2), time).flatten(1).numpy()
        above, alone = regression(z_t_BD, alpha, sigma, c_BK), regression(z_t_BD, alpha, sigma, None)
        np.testing.assert_allclose(found, above + guidance * (above - alone), rtol=0, atol=2e-3 if t < 0.2 else 2e-4)


def gaussian(toy: Callable[..., Recipe], name: str, **training: object) -> Recipe:
    recipe = toy(name, **training)
    document = yaml.safe_load(recipe.file.read_text())
    document["denoiser"]["gaussian"] = True
    recipe.file.write_text(yaml.safe_dump(document))
    return load_recipe(recipe.file)


@pytest.mark.usefixtures("fresh_accelerator")
def test_it_is_fitted_once_kept_with_the_weights_and_trained_on(toy: Callable[..., Recipe]) -> None:
    recipe = gaussian(toy, "whole", steps=10)
    train(recipe, 1)
    rows_ND = open_store(recipe.root / "stores" / "toy" / "tiny" / "2x2x3.zarr").load().astype("f8")
    rows_ND = rows_ND.reshape(-1, 2, 2, 3).transpose(0, 3, 1, 2).reshape(-1, 12)
    top = newest(run_dir(recipe, 1))
    assert top is not None
    weights = top.load("ema")
    np.testing.assert_allclose(weights["gaussian.mean_D"], rows_ND.mean(0), atol=1e-6)
    variance_D, basis_DD = weights["gaussian.variance_D"].double(), weights["gaussian.basis_DD"].double()
    found = (basis_DD * variance_D) @ basis_DD.T
    np.testing.assert_allclose(found, np.cov(rows_ND, rowvar=False, bias=True), atol=1e-5)

    train(recipe, 0)
    for steps in (4, 10):
        train(gaussian(toy, "paused", steps=steps), 0)
    assert parts(gaussian(toy, "paused", steps=10)) == parts(recipe)


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_training_begins_at_the_loss_of_the_linear_prediction(toy: Callable[..., Recipe]) -> None:
    """Which is less than that of any other multiple of it, over rows and noise that it was not fitted to."""
    from accelerate import Accelerator

    recipe = gaussian(toy, "first", batch=2000, condition_drop=0.3)
    data, process = open_training_data(recipe, 0), level_process(recipe, 0)
    losses = {}
    for factor in (0.9, 1.0, 1.1):
        config = _config(recipe)
        denoiser = Denoiser(config)
        fit_gaussian(denoiser.gaussian, data)
        for name in ("variance_D", "given_variance_D"):
            denoiser.gaussian.get_buffer(name).mul_(factor)
        trainer = Trainer(Accelerator(cpu=True), denoiser, process, recipe.training)
        losses[factor] = float(trainer.step(make_batch(data, 0), 0).loss)
    assert losses[1.0] < min(losses[0.9], losses[1.1])
    assert losses[1.0] < 0.5


def _config(recipe: Recipe) -> DenoiserConfig:
    from nestgen.denoiser.config import denoiser_config

    return denoiser_config(recipe, 0)


def test_what_it_does_not_go_with_is_said(toy: Callable[..., Recipe]) -> None:
    recipe = gaussian(toy, "refused", steps=2)
    with pytest.raises(UserError, match="holds a network that predicts all by itself"):
        train(recipe, 0, init=recipe.file)
    data = open_training_data(recipe, 0)
    few = replace(
        data, stores=replace(data.stores, z=replace(data.stores.z, attributes={**data.stores.z.attributes, "views": 1}))
    )
    with pytest.raises(UserError, match="44 values: 2,048 are the most, and 40 the rows"):
        fit_gaussian(Denoiser(_config(recipe)).gaussian, few)
    document = yaml.safe_load(recipe.file.read_text())
    document["levels"][1]["sigma"] = [0.0, 1.0]
    document["denoiser"]["sigma_told"] = True
    recipe.file.write_text(yaml.safe_dump(document))
    with pytest.raises(UserError, match=r"levels\[1\].sigma is a range, and denoiser.gaussian holds for one sigma"):
        load_recipe(recipe.file)


def test_sizes_are_counted_without_tensors(toy: Callable[..., Recipe]) -> None:
    with torch.device("meta"):
        denoiser = Denoiser(_config(gaussian(toy, "sizes")))
        above = torch.zeros(2, 3, 2, 2)
        given = denoiser.gaussian.given(above, torch.ones(2, dtype=torch.bool))
        mean_BCHW, _ = denoiser.gaussian(torch.zeros(2, 2, 4, 4), torch.ones(2), torch.ones(2), given)
    assert mean_BCHW.shape == (2, 2, 4, 4)
