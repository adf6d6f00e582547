"""A run that is killed, stopped or cut short, and goes on, ends in the same weights."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch

from nestgen.errors import UserError
from nestgen.recipe.locations import run_dir
from nestgen.recipe.recipe import Recipe
from nestgen.runs import checkpoint
from nestgen.runs.checkpoint import newest
from nestgen.runs.folder import best_step, training_lock
from nestgen.training import preview
from nestgen.training.train import train
from tests.nestgen.training_runs import SHRINK, TRAIN, log, parts, steps_kept, wait_for_checkpoint

Fork = Callable[..., BaseProcess]
pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_stopped_killed_and_undisturbed_runs_end_in_the_same_bytes(
    toy: Callable[..., Recipe], begin: Callable, fork: Fork
) -> None:
    steps = 200
    undisturbed = toy("undisturbed", steps=steps, checkpoint_every=7)
    train(undisturbed, 0)

    recipe = toy("disturbed", steps=steps, checkpoint_every=7)
    stopped = begin(recipe.root, "nestgen", "train", "--level", 0, "--recipe", recipe.file, before=SHRINK)
    wait_for_checkpoint(recipe, 7, lambda: stopped.process.exitcode)
    os.kill(stopped.process.pid, signal.SIGINT)
    code, _, errors = stopped.ended()
    assert code == 130, errors
    reached = newest(run_dir(recipe, 0))
    assert reached is not None
    assert 7 <= reached.step < steps
    last = errors.strip().splitlines()[-1]
    assert f"stopped after step {reached.step} of {steps}" in last
    assert "the same command goes on from there" in last
    assert "Traceback" not in errors

    # Killed five times, at steps that chance picks between checkpoints.
    rng, killed_at = np.random.default_rng(), []
    for _ in range(5):
        process = fork(TRAIN, recipe=recipe)
        wait_for_checkpoint(recipe, reached.step + 7, lambda process=process: process.exitcode)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        reached = newest(run_dir(recipe, 0))
        assert reached is not None
        killed_at.append(reached.step)
    assert killed_at[-1] < steps, killed_at

    train(recipe, 0)
    assert parts(recipe) == parts(undisturbed)
    # the log has one line an interval, as if nothing had happened, but for the one of the stop
    wanted = {line["step"]: line for line in log(undisturbed)}
    found = [line for line in log(recipe) if line["step"] in wanted]
    assert [line["step"] for line in found] == list(wanted)
    after = [line for line in found if line["step"] > killed_at[-1] + 10]
    assert after and after == [wanted[line["step"]] for line in after]


@pytest.mark.parametrize("pauses", [(1,), (7, 10, 19)])
def test_going_on_at_any_step_changes_nothing(toy: Callable[..., Recipe], pauses: tuple[int, ...]) -> None:
    train(toy("straight", steps=23), 0)
    for steps in (*pauses, 23):
        train(toy("paused", steps=steps, checkpoint_every=steps, keep=1), 0)
    assert parts(toy("paused")) == parts(toy("straight"))


def test_changed_settings_are_refused_and_listed(toy: Callable[..., Recipe], experiment: Callable[..., Path]) -> None:
    recipe = toy(steps=2)
    train(recipe, 0)
    before = parts(recipe)
    for change, says in [
        ({"lr": 2e-3}, ["training.lr was 0.001 and is 0.002"]),
        ({"warmup": 1, "seed": 4}, ["training.warmup was 5 and is 1", "seed was 0 and is 4"]),
        ({"clip": None, "batch": 4}, ["training.clip was 1.0 and is None", "training.batch was 8 and is 4"]),
    ]:
        with pytest.raises(UserError) as caught:
            train(toy(**{"steps": 4, **change}), 0)
        assert all(what in str(caught.value) for what in says)
        assert "\n" not in str(caught.value)
    shutil.rmtree(recipe.root / "stores")
    experiment(rows=44, levels=({"shape": "4x4x2"}, {"shape": "2x2x3"}), views=2, classes=3, moments=True)
    with pytest.raises(UserError, match=r"labels was .* stores\.z0 was .*and is .*stores\.z1 was"):
        train(toy(steps=4), 0)
    assert parts(recipe) == before


def test_a_checkpoint_of_before_an_option_goes_on_as_if_it_were_off(toy: Callable[..., Recipe]) -> None:
    """Keys that came with later versions are not in its meta.json, nor in the configuration of its denoiser."""
    train(toy("straight", steps=12), 0)
    recipe = toy("older", steps=10)
    train(recipe, 0)
    file = run_dir(recipe, 0) / "checkpoints/00000010/meta.json"
    meta = json.loads(file.read_text())
    for section, keys in (
        ("training", ("muon", "lr_decay", "side_loss", "align")),
        ("denoiser", ("side_head", "aligned")),
    ):
        for key in keys:
            del meta[section][key]
    del meta["sha256"], meta["meta_sha256"]
    file.write_text(json.dumps(meta))
    train(toy("older", steps=12), 0)
    assert parts(recipe) == parts(toy("straight", steps=12))
    with pytest.raises(UserError, match=r"training\.side_loss was None and is 0\.5"):
        train(toy("older", steps=13, side_loss=0.5), 0)
    decayed = toy("decayed", steps=10, lr_decay="linear")
    train(decayed, 0)
    with pytest.raises(UserError, match=r"training\.steps was 10 and is 20"):
        train(toy("decayed", steps=20, lr_decay="linear"), 0)
    train(toy("decayed", steps=20, lr_decay="linear"), 0, requested=("steps",))
    assert newest(run_dir(decayed, 0)).step == 20  # type: ignore[union-attr]


def test_a_damaged_checkpoint_is_not_passed_over(
    toy: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    train(toy("straight", steps=30), 0)
    recipe = toy("cut", steps=20)
    train(recipe, 0)
    cut = run_dir(recipe, 0) / "checkpoints/00000020/ema.safetensors"
    os.truncate(cut, cut.stat().st_size // 2)
    with pytest.raises(UserError, match=r"00000020 is damaged: .* or remove the folder to go on from step 10"):
        train(toy("cut", steps=30), 0)
    shutil.rmtree(cut.parent)
    train(toy("cut", steps=30), 0)
    assert "goes on from step 10" in capsys.readouterr().out
    assert parts(recipe) == parts(toy("straight"))


def test_the_best_checkpoint_survives_a_kill_before_its_preview(
    toy: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"checkpoint_every": 2, "keep": 1, "preview": 4}
    distances = iter([3.0, 1.0, 2.0, 0.5])
    monkeypatch.setattr(preview, "frechet_distance", lambda samples, reference: next(distances))
    sample = preview.Preview.sample

    def killed(self: preview.Preview, folder: Path, step: int, device: torch.device) -> preview.PreviewResult:
        if step in (4, 8):
            raise ConnectionAbortedError  # nothing catches it, as nothing catches SIGKILL
        return sample(self, folder, step, device)

    with monkeypatch.context() as patch:
        patch.setattr(preview.Preview, "sample", killed)
        with pytest.raises(ConnectionAbortedError):
            train(toy(steps=6, **options), 0)
    recipe = toy(steps=6, **options)
    assert steps_kept(recipe) == ["00000002", "00000004"]
    train(recipe, 0)
    assert steps_kept(recipe) == ["00000004", "00000006"]
    recipe = toy(steps=8, **options)
    with monkeypatch.context() as patch:
        patch.setattr(preview.Preview, "sample", killed)
        with pytest.raises(ConnectionAbortedError):
            train(recipe, 0)
    with (run_dir(recipe, 0) / "scores.jsonl").open("a") as scores:
        scores.write('{"step": 8, "freche')  # cut off by a full disk
    train(recipe, 0)  # complete, but for the preview of its last checkpoint
    assert best_step(run_dir(recipe, 0)) == 8


def test_checkpoints_that_the_disk_has_no_room_for_are_refused(
    toy: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = toy(steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "free_bytes", lambda path: 0)
        with pytest.raises(
            UserError,
            match=r"the checkpoints of .* take \S+ GB more, and its disk has 0 GB left; .* smaller training\.keep",
        ):
            train(recipe, 0)
    assert [file.name for file in run_dir(recipe, 0).iterdir()] == [".lock"]
    train(recipe, 0)
    files = run_dir(recipe, 0).glob("checkpoints/00000001/*.safetensors")
    parameters = json.loads((run_dir(recipe, 0) / "config.json").read_text())["parameters"]
    assert sum(file.stat().st_size for file in files) == pytest.approx(16 * parameters, rel=0.2)


def test_no_room_for_a_checkpoint(toy: Callable[..., Recipe]) -> None:
    recipe = toy(steps=5)
    train(recipe, 0)
    before = parts(recipe)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the system refuses larger files
    try:
        with pytest.raises(UserError, match=r"cannot write the checkpoint of step 8 .* that of step 5 is intact"):
            train(toy(steps=8), 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert steps_kept(recipe) == ["00000005"]
    assert parts(recipe) == before
    train(toy(steps=8), 0)
    train(toy("straight", steps=8), 0)
    assert parts(recipe) == parts(toy("straight"))


@pytest.mark.parametrize("limit", [0, 100, 1000, 3000])
def test_a_full_disk_is_named(toy: Callable[..., Recipe], limit: int) -> None:
    """Wherever it happens: at the lock, the recipe, the log, the checkpoint, the preview."""
    recipe = toy(steps=12, preview=4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(UserError, match=rf"cannot write .*{run_dir(recipe, 0)}.* \(.*\); .*make room there"):
            train(recipe, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    train(recipe, 0)
    assert steps_kept(recipe) == ["00000010", "00000012"]


def test_two_trainings_of_a_run_are_refused(toy: Callable[..., Recipe]) -> None:
    recipe = toy(steps=2)
    with (
        training_lock(run_dir(recipe, 0)),
        pytest.raises(UserError, match=rf"is being trained by .*process {os.getpid()}"),
    ):
        train(recipe, 0)
    train(recipe, 0)  # the lock is gone with its holder
