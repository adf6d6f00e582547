"""Sampling from Python: the same pictures as the command's, from a run's folder alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nestgen import NestedPipeline
from nestgen.errors import UserError
from nestgen.images import read_images
from nestgen.recipe.recipe import load_recipe
from nestgen.sampling.conditions import Request
from nestgen.sampling.latents import open_latents
from nestgen.sampling.pipeline import Step
from nestgen.sampling.sample import sample

Trained = Callable[..., Path]


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Path:
    """A run's folder, moved away from its stores."""
    recipe = load_recipe(trained(sampling={"steps": 3}))
    for folder in (tmp_path / "runs" / "toy").iterdir():
        shutil.copy(recipe.file, folder / "recipe.yaml")  # as training does
    sample(recipe, tmp_path / "s", Request(5, 2, 5))
    shutil.move(tmp_path / "runs" / "toy", tmp_path / "moved")
    shutil.rmtree(tmp_path / "stores")
    return tmp_path / "moved"


def test_samples_what_the_command_samples(run: Path, tmp_path: Path) -> None:
    found = NestedPipeline.from_run(run).sample(5, seed=2)
    pictures = np.stack([np.asarray(image) for image in found.images])
    np.testing.assert_array_equal(pictures, read_images(tmp_path / "s", 5))
    for level in range(3):
        kept = open_latents(tmp_path / "s", level).read_all()
        np.testing.assert_array_equal(found.latents[level].permute(0, 2, 3, 1).numpy(), kept)


def test_batches_callback_and_settings(run: Path) -> None:
    pipe = NestedPipeline.from_run(str(run), device="cpu")
    steps: list[Step] = []
    parts = list(pipe.batches(5, seed=2, batch=2, steps=[3, 2, 1], guidance=0.5, callback=steps.append))
    assert [len(part.images) for part in parts] == [2, 2, 1]
    first = [(step.level, step.step, step.steps) for step in steps[:6]]
    assert first == [(2, 0, 1), (1, 0, 2), (1, 1, 2), (0, 0, 3), (0, 1, 3), (0, 2, 3)]
    assert steps[0].latent_BCHW.shape == (2, 4, 2, 2)
    whole = pipe.sample(5, seed=2, steps=[3, 2, 1], guidance=0.5)
    together = torch.cat([part.latents[0] for part in parts])
    assert float((together - whole.latents[0]).abs().max()) < 1e-4 * float(together.std())


def test_frozen_levels_are_kept(run: Path) -> None:
    pipe = NestedPipeline.from_run(run)
    free = pipe.sample(3)
    again = pipe.sample(3, frozen={level: free.latents[level] for level in (1, 2)})
    torch.testing.assert_close(again.latents[0], free.latents[0], rtol=0, atol=0)
    one = pipe.sample(3, frozen={1: free.latents[1][:1], 2: free.latents[2][:1]})
    torch.testing.assert_close(one.latents[1], free.latents[1][:1].expand(3, -1, -1, -1))


def test_depth_is_the_deepest_that_is_there(run: Path) -> None:
    assert len(NestedPipeline.from_run(run, depth=2).samplers) == 2
    shutil.rmtree(run / "z2-top")
    assert len(NestedPipeline.from_run(run).samplers) == 2


def test_what_is_wrong_is_one_sentence(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run"):
        NestedPipeline.from_run(tmp_path / "nowhere")
    pipe = NestedPipeline.from_run(run)
    with pytest.raises(UserError, match=r"sampling\.stps is not a key"):
        pipe.sample(2, stps=4)
    with pytest.raises(UserError, match="there is no label 3"):
        pipe.sample(2, label=3)
    with pytest.raises(UserError, match="take no captions"):
        pipe.sample(2, prompts="x")
    with pytest.raises(UserError, match="set it in the recipe"):
        pipe.sample(2, autoguide={"scale": 1, "step": 3})


def test_importing_nestgen_is_light() -> None:
    script = (
        "import sys, nestgen; assert 'torch' not in sys.modules; nestgen.NestedPipeline; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
