"""Options that raise quality per minute of training: each does what it says, and nothing once it is over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from nestgen.denoiser.config import denoiser_config
from nestgen.denoiser.uvit import Denoiser
from nestgen.diffusion.process import level_process
from nestgen.errors import UserError
from nestgen.recipe.locations import run_dir
from nestgen.recipe.recipe import Recipe
from nestgen.recipe.sections import TrainingOptions
from nestgen.runs.checkpoint import load_denoiser
from nestgen.training.batches import Batch, make_batch, open_training_data
from nestgen.training.optimizers import make_optimizers
from nestgen.training.step import learning_rate
from nestgen.training.train import train
from tests.nestgen.training_runs import initial, parts

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")


@pytest.mark.parametrize(
    ("decay", "rates"),
    [
        ("linear", [0.5, 1, 1, 0.5, 0.02]),
        ("cosine", [0.5, 0.853553, 0.5, 0.146447, 0.000247]),
        ("inverse-sqrt", [0.5, (2 / 25) ** 0.5, 0.2, (2 / 75) ** 0.5, (2 / 99) ** 0.5]),
    ],
)
def test_decays_of_the_learning_rate(decay: Any, rates: list[float]) -> None:
    options = TrainingOptions(lr=1.0, warmup=2, steps=100, lr_decay=decay)
    assert [learning_rate(options, step) for step in (0, 25, 50, 75, 99)] == pytest.approx(rates, abs=1e-6)


@needs_muon
def test_muon_makes_steps_of_matrices_orthogonal_and_leaves_the_rest_to_adamw() -> None:
    """The singular values of a gradient, by its norm, go five times through 3.4445 s - 4.775 s^3 + 2.0315 s^5."""
    rng = torch.Generator().manual_seed(0)
    weights = {
        name: torch.nn.Parameter(torch.randn(shape, generator=rng))
        for name, shape in {
            "mid_block.mlp.fc1.weight": (12, 5),
            "mid_block.norm1.weight": (5,),
            "pos_embed": (7, 5),
        }.items()
    }
    options = TrainingOptions(lr=1e-3, muon=2e-3, weight_decay=0.0)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    for weight in weights.values():
        weight.grad = torch.randn(weight.shape, generator=rng)
    gradient = weights["mid_block.mlp.fc1.weight"].grad
    assert gradient is not None
    for one in make_optimizers(Accelerator(cpu=True), weights, options):
        one.step(0.5e-3, torch.tensor(True))  # half of the recipe's, as in the middle of a warm-up
    moved = {name: before[name] - weight.detach() for name, weight in weights.items()}
    u, s, v = torch.linalg.svd(gradient.double() / gradient.norm(), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    wanted = 1e-3 * 0.2 * 12**0.5 * (u * s) @ v
    torch.testing.assert_close(
        moved["mid_block.mlp.fc1.weight"].double(), wanted, rtol=0, atol=0.03 * float(wanted.abs().max())
    )
    for name in ("mid_block.norm1.weight", "pos_embed"):
        torch.testing.assert_close(moved[name].abs(), torch.full_like(moved[name], 0.5e-3), rtol=1e-3, atol=0)


@needs_muon
def test_muon_goes_on_as_if_nothing_had_happened(toy: Callable[..., Recipe]) -> None:
    train(toy("straight", steps=12, muon=2e-3), 0)
    for steps in (5, 12):
        train(toy("paused", steps=steps, muon=2e-3), 0)
    assert parts(toy("paused")) == parts(toy("straight"))


def test_the_side_head_learns_the_prediction(toy: Callable[..., Recipe]) -> None:
    """Its loss falls with its weight in the total, where next to no weight leaves it as it began."""
    beside, taught = (toy(f"side{w:g}", steps=150, side_loss=w, lr=5e-3) for w in (1e-9, 0.5))
    train(beside, 0)
    train(taught, 0)
    losses = []
    for recipe in (beside, taught):
        denoiser, _ = load_denoiser(run_dir(recipe, 0))
        batch = make_batch(open_training_data(recipe, 0), 10**6)
        process = level_process(recipe, 0)
        z_t = process.add_noise(batch.z_BCHW, batch.eps_BCHW, batch.at.t_B)
        with torch.no_grad():
            outputs = denoiser(
                z_t, process.time_embedding_input(batch.at.t_B), **batch.denoiser_inputs(), all_outputs=True
            )
        losses.append(float(process.loss(outputs.side_BCHW, batch.z_BCHW, batch.eps_BCHW, batch.at.t_B)))
    assert losses[1] < 0.7 * losses[0]


def test_early_blocks_are_aligned_to_the_stored_features_for_a_share_of_the_steps(
    toy: Callable[..., Recipe], store_writer: Callable[..., Path]
) -> None:
    """While it lasts, the cosine to the base store's rows rises; afterwards its own layer stays as it is."""

    def aligned(name: str, steps: int, until: float) -> Recipe:
        align = {"weight": 1.0, "until": until}
        return toy(name, steps=steps, align=align, lr=3e-3, weight_decay=0.0, checkpoint_every=40, keep=9, batch=16)

    recipe = aligned("aligned", 120, 1 / 3)
    keys = [f"picture-{row}" for row in range(40)]
    features = np.random.default_rng(0).normal(size=(40, 2, 4, 4, 64)) + 2 * np.random.default_rng(1).normal(size=64)
    path = recipe.root / "stores" / "toy" / "tiny" / "base.zarr"
    store_writer(path, features.astype("<f2"), keys=keys, block_rows=8, latent_shape=[4, 4, 64], kind="base")
    batch = make_batch(open_training_data(recipe, 0), 0)
    assert batch.features_BChw is not None
    grid = recipe.levels[0].grid
    assert batch.features_BChw.shape == (16, 64, *grid)
    rows = open_training_data(recipe, 0).rows(np.arange(16))
    averages = [features[row].reshape(2, grid[0], 4 // grid[0], grid[1], 4 // grid[1], 64).mean((2, 4)) for row in rows]
    for found, views in zip(batch.features_BChw.permute(0, 2, 3, 1).numpy(), averages, strict=True):
        assert min(np.abs(found - view).max() for view in views) < 0.01
    train(recipe, 0)
    checkpoint = run_dir(recipe, 0) / "checkpoints"
    tensors = [load_file(checkpoint / f"{step:08d}" / "denoiser.safetensors") for step in (40, 80, 120)]
    cosines = [_cosine(recipe, one, batch) for one in (initial(recipe), tensors[0])]
    assert cosines[1] > max(0.5, cosines[0] + 0.3)
    moved = [float((two["align_conv.weight"] - one["align_conv.weight"]).norm()) for one, two in pairwise(tensors)]
    assert moved[1] < 0.1 * float((tensors[0]["align_conv.weight"] - initial(recipe)["align_conv.weight"]).norm())
    with pytest.raises(UserError, match=r"training\.steps was 120 and is 160"):  # they decide when it ends
        train(aligned("aligned", 160, 1 / 3), 0)
    shutil.rmtree(path)
    store_writer(path, (-features).astype("<f2"), keys=keys, block_rows=8, latent_shape=[4, 4, 64], kind="base")
    with pytest.raises(UserError, match=r"settings: stores\.features was"):
        train(recipe, 0)
    file = checkpoint / "00000120" / "meta.json"
    meta = json.loads(file.read_text())
    del meta["stores"]["features"], meta["meta_sha256"]  # as earlier versions left it
    file.write_text(json.dumps(meta))
    train(recipe, 0)


def _cosine(recipe: Recipe, weights: dict[str, torch.Tensor], batch: Batch) -> float:
    denoiser = Denoiser(denoiser_config(recipe, 0))
    denoiser.load_state_dict(weights)
    process = level_process(recipe, 0)
    z_t = process.add_noise(batch.z_BCHW, batch.eps_BCHW, batch.at.t_B)
    with torch.no_grad():
        outputs = denoiser(z_t, process.time_embedding_input(batch.at.t_B), **batch.denoiser_inputs(), all_outputs=True)
    assert batch.features_BChw is not None
    return float(torch.cosine_similarity(outputs.features_BChw, batch.features_BChw, 1).mean())


def test_muon_asks_for_a_torch_that_has_it(toy: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(UserError, match=r"training\.muon needs torch 2\.9 or later, and this is .*; set muon: null"):
        train(toy("old", steps=1, muon=1e-3), 0)
