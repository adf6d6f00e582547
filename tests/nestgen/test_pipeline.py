"""Sampling from Python: the same images as the command's, from a run's folder alone; wrong arguments are one sentence."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from nestgen import NestedPipeline
from nestgen.errors import UserError
from nestgen.images import read_images
from nestgen.pipeline import Samples
from nestgen.recipe.locations import run_dir
from nestgen.recipe.recipe import load_recipe
from nestgen.runs.checkpoint import newest, save_checkpoint
from nestgen.runs.ema_snapshots import reconstruct, save_snapshot
from nestgen.sampling.conditions import Request
from nestgen.sampling.latents import open_latents
from nestgen.sampling.sample import sample

Trained = Callable[..., Path]


def images_of(samples: Samples) -> np.ndarray:
    """uint8 (N, H, W, 3) of PIL images."""
    return np.stack([np.asarray(image) for image in samples.images])


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


@pytest.fixture
def pipe(run: Path) -> NestedPipeline:
    return NestedPipeline.from_run(run, device="cpu")


def test_samples_what_the_command_samples(pipe: NestedPipeline, tmp_path: Path) -> None:
    found = pipe(num_images=5, seed=2)
    assert isinstance(found.images[0], Image.Image)
    assert (found.seed, found.indices) == (2, (0, 1, 2, 3, 4))
    np.testing.assert_array_equal(images_of(found), read_images(tmp_path / "s", 5))
    for level in range(3):
        sampled = open_latents(tmp_path / "s", level).read_all()
        np.testing.assert_array_equal(found.latents[level].permute(0, 2, 3, 1).numpy(), sampled)


def test_output_types(pipe: NestedPipeline) -> None:
    images = images_of(pipe(num_images=2))
    arrays = pipe(num_images=2, output_type="np").images
    assert isinstance(arrays, np.ndarray)
    assert arrays.dtype == np.float32
    np.testing.assert_array_equal((arrays * 255).round().astype(np.uint8), images)
    found = pipe(num_images=2, output_type="latent")
    assert found.images is found.latents[0]


def test_some_images_at_a_time_and_batches_are_the_same(pipe: NestedPipeline) -> None:
    whole = pipe(num_images=5, seed=2, progress=False)
    for other in (pipe(num_images=5, seed=2, batch=2), pipe(indices=range(5), seed=2)):
        assert float((other.latents[0] - whole.latents[0]).abs().max()) < 1e-4 * float(whole.latents[0].std())
    late = pipe(indices=[4, 3], seed=2)
    assert float((late.latents[0] - whole.latents[0][[4, 3]]).abs().max()) < 1e-4 * float(whole.latents[0].std())


def test_callback_and_settings(pipe: NestedPipeline) -> None:
    calls: list[tuple[int, int, int]] = []
    times: list[float] = []

    def record(which: NestedPipeline, step: int, timestep: float, arguments: dict[str, Any]) -> None:
        assert which is pipe
        assert arguments["indices"] == (0, 1)
        calls.append((arguments["level"], step, arguments["steps"]))
        times.append(timestep)
        assert arguments["latents"].shape[:2] == (2, {0: 3, 1: 6, 2: 4}[arguments["level"]])

    pipe(num_images=2, num_inference_steps=[3, 2, 1], guidance_scale=1.5, callback_on_step_end=record)
    assert calls == [(2, 0, 1), (1, 0, 2), (1, 1, 2), (0, 0, 3), (0, 1, 3), (0, 2, 3)]
    assert times[0] == times[1] == 1.0
    assert 1.0 > times[4] > times[5] > 0


def test_guidance_scale_and_sigma_are_the_recipe_s(pipe: NestedPipeline) -> None:
    ours = pipe(num_images=2, guidance_scale=[2.5, 1, 1], sigma=0.3)
    theirs = pipe.recipe.with_sampling({"guidance": [1.5, 0, 0], "sigma": [None, 0.3, 0.3]})
    again = NestedPipeline(theirs, pipe.samplers, pipe.decode)
    torch.testing.assert_close(
        again(num_images=2, guidance_scale=[2.5, 1, 1], sigma=[0.3, 0.3]).latents[0], ours.latents[0]
    )
    assert not torch.equal(pipe(num_images=2).latents[0], ours.latents[0])


def test_a_generator_draws_other_images_each_time_and_the_same_from_its_start(pipe: NestedPipeline) -> None:
    generator = torch.Generator().manual_seed(3)
    first, second = (pipe(num_images=2, generator=generator) for _ in range(2))
    assert first.seed != second.seed
    assert not torch.equal(first.latents[0], second.latents[0])
    again = pipe(num_images=2, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(again.latents[0], first.latents[0], rtol=0, atol=0)
    torch.testing.assert_close(pipe(num_images=2, seed=first.seed).latents[0], first.latents[0], rtol=0, atol=0)


def test_frozen_levels_are_kept(pipe: NestedPipeline) -> None:
    free = pipe(num_images=3)
    again = pipe(num_images=3, frozen={level: free.latents[level] for level in (1, 2)})
    torch.testing.assert_close(again.latents[0], free.latents[0], rtol=0, atol=0)
    one = pipe(num_images=3, frozen={1: free.latents[1][:1].numpy(), 2: free.latents[2][:1]})
    torch.testing.assert_close(one.latents[1], free.latents[1][:1].expand(3, -1, -1, -1))


def test_half_precision_is_near(pipe: NestedPipeline) -> None:
    exact = pipe(num_images=3, seed=1).latents[0]
    assert pipe.to("cpu", torch.bfloat16) is pipe
    half = pipe(num_images=3, seed=1).latents[0]
    assert pipe.samplers[0].trained.denoiser.pos_embed.dtype == torch.bfloat16
    assert half.dtype == torch.float32
    assert 0 < float((half - exact).std()) < 0.1 * float(exact.std())
    pipe.to(torch.float32)
    assert pipe.samplers[0].trained.denoiser.pos_embed.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "kind", "sentence"),
    [
        ({"stps": 4}, TypeError, "no argument 'stps'"),
        ({"guidence_scale": 4}, TypeError, "did you mean 'guidance_scale'"),
        ({"steps": 4}, TypeError, "it is num_inference_steps here"),
        ({"autoguide": {"scale": 1, "step": 3}}, ValueError, "set it in the recipe"),
        ({"internal_guidance": {"scale": 1.5}}, ValueError, "the denoiser of z_0 has no side head"),
        ({"num_images": 0}, ValueError, "num_images is 0; give 1 or more"),
        ({"num_images": 2.0}, TypeError, "num_images is 2.0; give a whole number"),
        ({"num_images": 1, "indices": [3]}, ValueError, "exclude each other"),
        ({"indices": []}, ValueError, "indices is empty"),
        ({"indices": [-1]}, ValueError, "give 0 or more"),
        ({"seed": torch.Generator()}, TypeError, "seed is .*; give a whole number"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"generator": 3}, TypeError, "give a torch.Generator, or a number as seed"),
        ({"generator": torch.Generator(), "seed": 3}, ValueError, "exclude each other"),
        ({"label": 3}, ValueError, "there is no label 3"),
        ({"label": "cat"}, ValueError, "no class named 'cat'; give its number"),
        ({"label": True}, TypeError, "label is True"),
        ({"prompt": 3}, TypeError, "give a text, or a list of texts"),
        ({"prompt": []}, TypeError, "give a text, or a list of texts"),
        ({"prompt": [None, "a"]}, TypeError, "give a text, or a list of texts"),
        ({"prompt": "a dog"}, ValueError, "take no captions"),
        ({"prompts": "x"}, ValueError, "take no captions"),
        ({"frozen": {7: torch.zeros(1, 4, 2, 2)}}, ValueError, "frozen has level 7; the levels above z_0 are 1 to 2"),
        ({"frozen": {0: torch.zeros(1, 3, 8, 8)}}, ValueError, "frozen has level 0"),
        ({"frozen": {1: torch.zeros(1, 4, 2, 2)}}, ValueError, r"shape \(1, 4, 2, 2\); give \(1, 6, 4, 4\)"),
        ({"frozen": {2: torch.full((1, 4, 2, 2), torch.nan)}}, ValueError, "not finite"),
        ({"frozen": [torch.zeros(1, 4, 2, 2)]}, TypeError, "give latents by level"),
        ({"frozen": {1: 3}}, TypeError, "give a tensor"),
        ({"guidance_scale": "much"}, TypeError, "guidance_scale is 'much'; give a number"),
        ({"guidance_scale": [1, 2]}, ValueError, "sampling.guidance lists 2 values for 3 levels"),
        ({"sigma": [1]}, ValueError, "sigma lists 1 values for 2 level"),
        ({"sigma": -1}, ValueError, "greater than or equal to 0"),
        ({"num_inference_steps": 0}, ValueError, "greater than 0"),
        ({"sampler": "magic"}, ValueError, "sampling.sampler"),
        ({"output_type": "jpeg"}, ValueError, "give 'pil', 'np' or 'latent'"),
    ],
)
def test_a_wrong_argument_is_one_sentence(
    pipe: NestedPipeline, arguments: dict[str, Any], kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence) as error:
        pipe(**arguments)
    assert "\n" not in str(error.value)


def test_wrong_devices(pipe: NestedPipeline, run: Path) -> None:
    for call in (lambda: pipe.to("gpu"), lambda: NestedPipeline.from_run(run, device="gpu")):
        with pytest.raises(ValueError, match="there is no device 'gpu' here"):
            call()
    with pytest.raises(ValueError, match=r"dtype is torch\.int8"):
        pipe.to("cpu", torch.int8)


def test_depth_is_the_deepest_that_is_there(run: Path) -> None:
    assert len(NestedPipeline.from_run(run, depth=2).samplers) == 2
    shutil.rmtree(run / "z2-top")
    assert len(NestedPipeline.from_run(run).samplers) == 2
    with pytest.raises(ValueError, match=r"no such hierarchy; choose .*: depth 2, sigma 0\.5; depth 1"):
        NestedPipeline.from_run(run, depth=3)


def with_sigma(run: Path, name: str, sigmas: list[float], recipe: list[float] | None = None) -> None:
    """Copies a denoiser of a run as one that was trained with other sigmas, by a recipe that has its own."""
    other = run / name
    shutil.copytree(run / "z0-given-z1-sigma0.5", other, dirs_exist_ok=True)
    document = yaml.safe_load((other / "recipe.yaml").read_text())
    checkpoint = newest(other)
    assert checkpoint is not None
    for number, sigma in enumerate(sigmas, 1):
        if number < len(checkpoint.meta["levels"]):
            checkpoint.meta["levels"][number]["sigma"] = sigma
        document["levels"][number]["sigma"] = (recipe or sigmas)[number - 1]
    (other / "recipe.yaml").write_text(yaml.safe_dump(document))
    weights = {name: value * 1.01 for name, value in checkpoint.load("ema").items()}
    shutil.rmtree(other / "checkpoints")
    save_checkpoint(other, {"ema": weights}, checkpoint.meta, keep=1)


def test_a_hierarchy_is_chosen_by_sigma(run: Path) -> None:
    with_sigma(run, "z0-given-z1-sigma1.5", [1.5, 0.5], recipe=[0.5, 0.5])  # trained with --sigma
    own = NestedPipeline.from_run(run)
    assert own.recipe.levels[1].sigma == 0.5
    other = NestedPipeline.from_run(run, sigma=[1.5, 0.5])
    assert other.samplers[0].settings.sigmas == (1.5,)
    assert not torch.equal(own(seed=0).latents[0], other(seed=0).latents[0])
    assert NestedPipeline.from_run(run, sigma=1.5, depth=2).recipe.levels[1].sigma == 1.5
    with pytest.raises(
        ValueError, match=r"no such hierarchy; choose .*: depth 3, sigma 0.5, 0.5; depth 3, sigma 1.5, 0.5"
    ):
        NestedPipeline.from_run(run, sigma=7)


def test_nothing_depends_on_file_times(run: Path) -> None:
    with_sigma(run, "z0-given-z1-sigma1.5", [1.5, 0.5])  # by a recipe that was edited
    for newer in ("z0-given-z1-sigma0.5", "z0-given-z1-sigma1.5"):
        for name in ("z0-given-z1-sigma0.5", "z0-given-z1-sigma1.5"):
            time = 2_000_000_000 if name == newer else 1_000_000_000
            os.utime(run / name / "recipe.yaml", (time, time))
        with pytest.raises(
            ValueError, match=r"more than one such hierarchy; choose .* sigma 0.5, 0.5; .* sigma 1.5, 0.5"
        ):
            NestedPipeline.from_run(run)


def test_a_step_or_the_best_or_another_average(run: Path, tmp_path: Path) -> None:
    weights = {}
    for name in ("z0-given-z1-sigma0.5", "z1-given-z2-sigma0.5", "z2-top"):
        checkpoint = newest(run / name)
        assert checkpoint is not None
        weights[name] = checkpoint.load("ema")
        later = {key: value * 1.1 for key, value in weights[name].items()}
        save_checkpoint(run / name, {"ema": later}, {**checkpoint.meta, "step": 9}, keep=2)
        (run / name / "scores.jsonl").write_text(
            '{"step": 7, "frechet_distance": 1.0}\n{"step": 9, "frechet_distance": 2.0}\n'
        )
        for step, factor in ((4, 1.0), (8, 2.0)):
            for length in (0.05, 0.1):
                save_snapshot(run / name, step, length, {key: factor * value for key, value in weights[name].items()})
    newest_images, first = (NestedPipeline.from_run(run, step=step)(seed=0).latents[0] for step in (None, 7))
    assert not torch.equal(newest_images, first)
    torch.testing.assert_close(NestedPipeline.from_run(run, step="best")(seed=0).latents[0], first, rtol=0, atol=0)
    averaged = NestedPipeline.from_run(run, ema_length=0.07, step=8)
    assert averaged.samplers[0].trained.meta["ema_length"] == 0.07
    assert len(averaged.samplers[0].trained.sha256) == 64
    averaged.save_pretrained(tmp_path / "averaged")
    assert "averaged over a window of 0.07 of the steps" in (tmp_path / "averaged" / "README.md").read_text()
    for arguments, kind, sentence in (
        ({"step": 5}, UserError, r"no checkpoint of step 5, .* \(it has 7, 9\)"),
        ({"step": "last"}, TypeError, "step is 'last'"),
        ({"ema_length": 0.07, "step": "best"}, ValueError, "give its number"),
        ({"ema_length": 0.4}, ValueError, "give one between 0 and"),
    ):
        with pytest.raises(kind, match=sentence):
            NestedPipeline.from_run(run, **arguments)


def test_an_average_that_was_written_can_be_sampled_from(run: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir(exist_ok=True)
    shutil.move(run, tmp_path / "runs" / "toy")
    recipe = load_recipe(tmp_path / "nested.yaml")
    for level in range(3):
        checkpoint = newest(run_dir(recipe, level))
        assert checkpoint is not None
        save_snapshot(run_dir(recipe, level), 7, 0.05, checkpoint.load("ema"))
        save_snapshot(run_dir(recipe, level), 7, 0.1, checkpoint.load("ema"))
        reconstruct(recipe, level, 0.07, "average")
    written = NestedPipeline.from_run(tmp_path / "runs" / "average")(num_images=2).latents[0]
    made = NestedPipeline.from_run(tmp_path / "runs" / "toy", ema_length=0.07)(num_images=2).latents[0]
    torch.testing.assert_close(written, made, rtol=0, atol=0)


def test_what_is_wrong_with_a_run_is_one_sentence(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run"):
        NestedPipeline.from_run(tmp_path / "nowhere")
    shutil.rmtree(run / "z0-top")
    shutil.rmtree(run / "z1-top")
    shutil.rmtree(run / "z2-top")
    with pytest.raises(UserError, match="no trained denoiser of z_0 with all levels above it"):
        NestedPipeline.from_run(run)


def test_importing_nestgen_is_light() -> None:
    script = (
        "import sys, nestgen; assert 'torch' not in sys.modules; nestgen.NestedPipeline; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
