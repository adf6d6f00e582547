"""Training really trains, leaves what it should, and ends in one sentence where it can't go on."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from nestgen import randomness
from nestgen.denoiser.uvit import Denoiser
from nestgen.diffusion.process import Process
from nestgen.errors import UserError
from nestgen.recipe.locations import run_dir
from nestgen.recipe.recipe import Recipe, load_recipe
from nestgen.recipe.sections import TrainingOptions
from nestgen.runs.checkpoint import PARTS, load_denoiser, newest
from nestgen.runs.ema import decay
from nestgen.sampling.conditions import ImageConditions
from nestgen.sampling.descent import sample_images
from nestgen.sampling.trained import load_samplers
from nestgen.stores.hierarchy import open_hierarchy
from nestgen.training import loop
from nestgen.training.accelerator import bfloat16_is_faster
from nestgen.training.batches import Batch, TrainingData, make_batch
from nestgen.training.step import learning_rate
from nestgen.training.train import train
from tests.nestgen.training_runs import apart, initial, log, parts, raw_log, steps_kept

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_what_a_run_leaves(toy: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]) -> None:
    recipe = toy(steps=35, keep=2)
    train(recipe, 0)
    folder = run_dir(recipe, 0)
    assert steps_kept(recipe) == ["00000030", "00000035"]
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "README.md",
        "checkpoints",
        "config.json",
        "log.jsonl",
        "loss.png",
        "recipe.yaml",
    ]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "recipe.yaml").read_bytes() == recipe.file.read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert config["parameters"] == sum(p.numel() for p in initial(recipe).values())
    assert config["denoiser"]["condition_shapes"] == [[2, 2, 3]]
    assert [line["step"] for line in log(recipe)] == [10, 20, 30, 35]
    assert log(recipe)[0]["lr"] == pytest.approx(1e-3)
    assert "the 15 steps that are left take less than two minutes" in capsys.readouterr().out

    before = parts(recipe)
    (folder / "loss.png").unlink()  # as if killed after the last checkpoint
    train(recipe, 0)
    assert "is complete at step 35; nothing to do" in capsys.readouterr().out
    assert parts(recipe) == before
    assert (folder / "loss.png").is_file()
    train(toy(steps=40), 0)
    assert "goes on from step 35" in capsys.readouterr().out


def test_load_denoiser_is_the_average_of_the_weights(toy: Callable[..., Recipe]) -> None:
    recipe = toy(steps=12, ema=0.9)
    train(recipe, 0)
    denoiser, meta = load_denoiser(run_dir(recipe, 0))
    assert not denoiser.training
    assert not any(p.requires_grad for p in denoiser.parameters())
    ema = load_file(run_dir(recipe, 0) / "checkpoints/00000012/ema.safetensors")
    for name, value in denoiser.state_dict().items():
        assert torch.equal(value, ema[name])
    assert (meta["step"], meta["level"], meta["depth"]) == (12, 0, 2)
    assert meta["process"] == {"kind": "discrete", "prediction": "eps", "weighting": "uniform"}
    assert meta["levels"][1] == {"shape": [2, 2, 3], "sigma": 0.5, "patch": 1, "shift": 1.0, "size": None}
    assert meta["codec"] == {"name": "vae", "size": 32, "moments": True, "scale": 0.5}
    assert sorted(meta["stores"]) == ["labels", "z0", "z1"]
    with pytest.raises(UserError, match=r"no trained denoiser in .*z1-top; run `nestgen train --level 1`"):
        load_denoiser(run_dir(recipe, 1))


def test_average_follows_its_formula(toy: Callable[..., Recipe]) -> None:
    """ema_k = d_k ema_(k-1) + (1 - d_k) w_k with the weights of every step, in float64."""
    recipe = toy(steps=6, ema=0.5)
    average = {name: value.double() for name, value in initial(recipe).items()}
    for step in range(6):
        train(toy(steps=step + 1, ema=0.5, keep=9), 0)
        weights = load_file(run_dir(recipe, 0) / f"checkpoints/{step + 1:08d}/denoiser.safetensors")
        d = decay(recipe.training.ema, step)
        average = {name: d * old + (1 - d) * weights[name].double() for name, old in average.items()}
    found = load_file(run_dir(recipe, 0) / "checkpoints/00000006/ema.safetensors")
    for name, value in found.items():
        torch.testing.assert_close(value.double(), average[name], rtol=1e-5, atol=1e-6)


def test_schedules() -> None:
    options = TrainingOptions(lr=1.0, warmup=4, ema=0.99)
    assert [learning_rate(options, step) for step in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1, 1, 1]
    assert learning_rate(TrainingOptions(lr=2.0, warmup=0), 0) == 2
    assert [decay(options.ema, step) for step in (0, 8, 10**6)] == [0.1, 0.5, 0.99]


def test_another_sigma_trains_another_denoiser_beside_it(toy: Callable[..., Recipe]) -> None:
    recipe = toy(steps=2)
    train(recipe, 0)
    before, other = parts(recipe), toy(steps=2, sigma=1.0)
    train(other, 0)
    assert parts(recipe) == before
    assert run_dir(other, 0).name == "z0-given-z1-sigma1"
    assert run_dir(other, 0).parent == run_dir(recipe, 0).parent
    assert run_dir(other, 1) == run_dir(recipe, 1)  # the level above does not depend on it


def test_a_diverging_run_stops_before_it_spoils_a_checkpoint(
    toy: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = toy(steps=20, lr=1e30, clip=None)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_any_stops", lambda accelerator, stop, step: step == 9)  # as after Ctrl-C
        with pytest.raises(
            KeyboardInterrupt, match=r"step 9 of 20, not saved, as .* not finite: .* goes on from step 0"
        ):
            train(recipe, 0)
    with pytest.raises(UserError, match=r"the gradient of the last \d+ step.* not finite.* lower training\.lr"):
        train(recipe, 0)
    assert newest(run_dir(recipe, 0)) is None
    assert "Stopped; `nestgen train --level 0` goes on." in (run_dir(recipe, 0) / "README.md").read_text()
    with pytest.raises(UserError, match=r"not finite for 50 steps in a row, up to step \d+ .*lower training\.lr"):
        train(toy(steps=80, lr=1e30, clip=None), 0)
    assert newest(run_dir(recipe, 0)) is None
    assert "steps were skipped" in (run_dir(recipe, 0) / "README.md").read_text()


def test_what_cannot_run_here_is_refused(toy: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"level 2 is not within 0\.\.1"):
        train(toy(), 2)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"training\.precision fp16 needs a GPU"):
            train(toy(precision="fp16"), 0)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    with pytest.raises(UserError, match=r"training\.batch 8 does not divide among 3 processes"):
        train(toy(), 0)


def test_a_step_that_is_not_finite_changes_nothing(toy: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    def make(data: TrainingData, step: int, *shares: Any) -> Batch:
        batch = make_batch(data, step, *shares)
        return replace(batch, z_BCHW=batch.z_BCHW * np.nan) if step == 4 else batch

    monkeypatch.setattr("nestgen.training.loop.make_batch", make)
    before, after = toy("four", steps=4), toy("five", steps=5, checkpoint_every=1, keep=9)
    train(before, 0)
    with pytest.raises(UserError, match=r"the gradient of the last 1 step\(s\)"):
        train(after, 0)
    assert steps_kept(after)[-1] == "00000004"
    train(toy("five", steps=6, checkpoint_every=1, keep=9), 0)  # one step is skipped, the next is not
    assert steps_kept(after)[-2:] == ["00000004", "00000006"]
    assert log(after)[-1]["loss"] is not None
    assert sum(line.get("skipped", 0) for line in raw_log(after)) == 1
    assert parts(before) == {
        part: (run_dir(after, 0) / f"checkpoints/00000004/{part}.safetensors").read_bytes() for part in PARTS
    }


@pytest.mark.parametrize("micro_batch", [2, 3, [3, 5]])
def test_a_batch_in_parts_makes_the_same_step(toy: Callable[..., Recipe], micro_batch: object) -> None:
    """The mean of the gradients of parts, equal or not, is that of the whole, but for rounding (as two processes')."""
    whole = toy("whole", steps=20)
    parted = toy("parted", steps=20, micro_batch=micro_batch, checkpoint_activations=True)
    train(whole, 0)
    train(parted, 0)
    assert 0 < apart(whole, parted) < 1e-3
    for x, y in zip(log(whole), log(parted), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-5)
    train(toy("parted", steps=21), 0)  # it may change as a run goes on


def test_a_step_that_memory_has_no_room_for_is_one_sentence(
    toy: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(*_: object, **__: object) -> None:
        torch.empty(1 << 60)  # torch's own error

    monkeypatch.setattr(Denoiser, "forward", allocate)
    for options, says in (
        (
            {},
            "with 8 sample(s) in one forward pass; set training.micro_batch to 4 or fewer, or training.checkpoint_act",
        ),
        (
            {"micro_batch": 1, "checkpoint_activations": True},
            "with 1 sample(s) in one forward pass; shard the denoiser",
        ),
    ):
        with pytest.raises(UserError, match=re.escape(f"does not fit into the memory of the machine, {says}")):
            train(toy(steps=1, **options), 0)
    monkeypatch.setattr(Denoiser, "forward", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA")))
    with pytest.raises(UserError, match="does not fit into the memory of the GPU"):
        train(toy(steps=1), 0)


def test_bfloat16_trains_like_float32(toy: Callable[..., Recipe]) -> None:
    train(toy("exact", steps=30), 0)
    AcceleratorState._reset_state(reset_partial_state=True)
    train(toy("short", steps=30, precision="bf16"), 0)
    for x, y in zip(log(toy("exact")), log(toy("short")), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=0.01)


def test_compiling_on_a_cpu_needs_a_compiler(toy: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"C\+\+ compiler on a CPU, and no-such-compiler is not there"):
        train(toy("compiled", steps=1, compile=True), 0)


@pytest.mark.parametrize(("faster", "precision"), [(True, "bf16"), (False, "no")])
def test_auto_precision_is_the_faster_one_and_stays(
    toy: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, faster: bool, precision: str
) -> None:
    """A run that goes on where the other one is faster keeps its own."""
    for step, here in ((1, faster), (2, not faster)):
        monkeypatch.setattr("nestgen.training.accelerator.bfloat16_is_faster", lambda here=here: here)
        AcceleratorState._reset_state(reset_partial_state=True)
        recipe = toy("auto", steps=step, precision="auto")
        train(recipe, 0)
        checkpoint = newest(run_dir(recipe, 0))
        assert checkpoint and (checkpoint.step, checkpoint.meta["training"]["precision"]) == (step, precision)


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "intel", "faster"),
    [
        (True, True, True, True),  # Sapphire Rapids and later
        (False, True, True, False),  # the same without AMX, as some clouds give it
        (False, True, False, True),  # AMD's Zen 4 and later
        (False, False, False, False),
    ],
)
def test_bfloat16_is_faster_where_it_was_measured(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx512_bf16: bool, intel: bool, faster: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr("nestgen.training.accelerator.is_intel", lambda: intel)
    assert bfloat16_is_faster() == faster


@pytest.mark.usefixtures("little")
def test_gaussian_data_is_learned_to_the_known_loss(
    experiment: Callable[..., Path], store_writer: Callable[..., Path]
) -> None:
    """z_0 ~ N(0, 0.7^2): the best predictor is known, and training comes within 1% of its loss."""
    recipe = load_recipe(
        experiment(
            levels=({"shape": "2x2x3"},),
            training={
                "steps": 300,
                "batch": 64,
                "lr": 2e-3,
                "betas": [0.9, 0.99],
                "warmup": 20,
                "ema": 0.98,
                "preview": 0,
            },
        )
    )
    path = recipe.root / "stores/toy/pixels/2x2x3.zarr"
    shutil.rmtree(path)
    values = (0.7 * randomness.normal(0, "data", range(4096), (1, 2, 2, 3))).numpy().astype("<f2")
    keys = [str(row) for row in range(4096)]
    codec = {"name": "pixels", "size": 2, "moments": False, "scale": 1.0}
    store_writer(path, values, kind="z0", keys=keys, block_rows=512, latent_shape=[2, 2, 3], codec=codec)
    train(recipe, 0)
    denoiser, _ = load_denoiser(run_dir(recipe, 0))

    process, n = Process("discrete"), 8000
    t = process.training_time(randomness.uniform(1, "t", range(n), ()))
    z, eps = 0.7 * randomness.normal(1, "z", range(n), (3, 2, 2)), randomness.normal(1, "eps", range(n), (3, 2, 2))
    z_t = process.add_noise(z, eps, t)
    alpha, sigma = process.alpha(t), process.sigma(t)
    best = (sigma / (0.49 * alpha**2 + sigma**2)).float()[:, None, None, None] * z_t
    reached, known = (
        process.loss(output, z, eps, t).item() for output in (denoiser(z_t, process.time_embedding_input(t)), best)
    )
    assert np.isclose(known, 0.293, atol=0.005)
    assert known < reached < 1.01 * known


def test_64_rows_are_learned_by_heart_and_sampled_back(experiment: Callable[..., Path]) -> None:
    """Every row has a class of its own. The bound is a third of what the best denoiser loses that knows nothing but the
    rows' mean and covariance; and samples of a class lie nearest to its row, half as far as to any other."""
    options = {"steps": 300, "batch": 64, "lr": 3e-3, "betas": [0.9, 0.99], "warmup": 10, "ema": 0.95, "clip": 1.0}
    recipe = load_recipe(
        experiment(
            rows=64,
            classes=64,
            levels=({"shape": "4x4x3", "patch": 4},),
            denoiser={"size": "nano", "labels": 64},
            training=options,
            sampling={"steps": 12, "guidance": 0.0},
        )
    )
    train(recipe, 0)
    sampler = load_samplers(recipe, torch.device("cpu"))[0]
    stored = open_hierarchy(recipe)[0].load()[:, 0].astype(np.float32)
    rows_BCHW = torch.from_numpy(stored).permute(0, 3, 1, 2)

    process, n, classes = sampler.trained.process, 32 * 64, torch.arange(64)
    z, eps = rows_BCHW.repeat(32, 1, 1, 1), randomness.normal(1, "eps", range(n), (3, 4, 4))
    t = process.training_time(randomness.uniform(1, "t", range(n), ()))
    z_t, told = process.add_noise(z, eps, t), process.time_embedding_input(t)
    with torch.inference_mode():
        reached = process.loss(sampler.trained.denoiser(z_t, told, label_B=classes.repeat(32)), z, eps, t).item()
    alpha, sigma = (one.float()[:, None] for one in (process.alpha(t), process.sigma(t)))
    rows_BD = rows_BCHW.flatten(1)
    mean_D = rows_BD.mean(0)
    variance_D, basis_DD = torch.linalg.eigh(rows_BD.T.cov(correction=0))
    y_BD = (z_t.flatten(1) - alpha * mean_D) @ basis_DD
    linear_BD = (sigma / (alpha**2 * variance_D + sigma**2) * y_BD) @ basis_DD.T
    known = process.loss(linear_BD.view_as(z), z, eps, t).item()
    assert reached < known / 3

    by_class = [sample_images([sampler], [row], ImageConditions(0, 64, label=row))[0] for row in range(64)]
    nearest = torch.cdist(torch.cat(by_class).flatten(1), rows_BD).topk(2, largest=False)
    assert (nearest.indices[:, 0] == classes).double().mean() > 0.8
    own, other = nearest.values.median(0).values
    assert own < other / 2


def test_accelerates_environment_changes_no_training(
    toy: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(toy("plain", steps=6), 0)
    for name, value in (
        ("GRADIENT_ACCUMULATION_STEPS", "4"),
        ("MIXED_PRECISION", "bf16"),
        ("DYNAMO_BACKEND", "EAGER"),
        ("USE_FSDP", "false"),
    ):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    AcceleratorState._reset_state(reset_partial_state=True)  # as in a process of its own
    train(toy("other", steps=6), 0)
    assert parts(toy("other")) == parts(toy("plain"))
    for name in ("USE_FSDP", "USE_DEEPSPEED", "USE_MEGATRON_LM", "USE_PARALLELISM_CONFIG"):
        monkeypatch.setenv(f"ACCELERATE_{name}", "true")
        with pytest.raises(UserError, match=f"ACCELERATE_{name} is set in the environment"):
            train(toy("refused", steps=6), 0)
        monkeypatch.delenv(f"ACCELERATE_{name}")


@pytest.mark.parametrize(
    ("steps", "seconds", "says"),
    [
        (299_980, 0.54, "299,980 steps that are left take 45.0 hours"),
        (80, 0.75, "less than two minutes"),
        (80, 60, "80 minutes"),
    ],
)
def test_the_time_that_a_training_needs_is_said(steps: int, seconds: float, says: str) -> None:
    from nestgen.training.progress import time_left

    assert says in time_left(steps, seconds)
