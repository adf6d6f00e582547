"""What a training shows on its way: previews, the held-out loss, and both in tensorboard and wandb."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import LoggerType
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nestgen.errors import UserError
from nestgen.recipe.locations import run_dir
from nestgen.recipe.recipe import Recipe
from nestgen.runs.scores import read as read_scores
from nestgen.training.train import train
from tests.nestgen.training_runs import raw_log, steps_kept

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_previews_and_the_best_checkpoint(toy: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]) -> None:
    recipe = toy(steps=40, keep=1, preview=12, checkpoint_every=10, trackers=["tensorboard"])
    recipe = recipe.with_sampling({"autoguide": {"scale": 1.0, "run": "weak"}})  # previews are without guidance
    train(recipe, 0)
    folder = run_dir(recipe, 0)
    scores = {line["step"]: line["frechet_distance"] for line in map(json.loads, (folder / "scores.jsonl").open())}
    assert list(scores) == [10, 20, 30, 40]
    best = min(list(scores)[:-1], key=scores.__getitem__)  # of those known when the last was written
    assert steps_kept(recipe) == sorted({f"{best:08d}", "00000040"})
    with Image.open(folder / "previews/00000040.png") as sheet:
        assert sheet.width > 8 * 80 and sheet.height > 2 * 80
    readme = (folder / "README.md").read_text()
    assert "Complete at step 40" in readme and "previews/00000040.png" in readme and "| best |" in readme
    events = EventAccumulator(str(next(folder.rglob("events.out.tfevents.*"))))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [10, 20, 30, 40]
    assert [event.value for event in events.Scalars("frechet_distance")] == pytest.approx(list(scores.values()))
    assert [event.step for event in events.Images("preview")] == [10, 20, 30, 40]
    assert all(0 < event.value < 1e3 for event in events.Scalars("gradient_norm"))
    assert all(line["memory_gib"] > 0.1 for line in raw_log(recipe))
    held_out = {line["step"]: line["loss"] for line in map(json.loads, (folder / "held-out.jsonl").open())}
    assert list(held_out) == [10, 20, 30, 40]
    for by_time in held_out.values():  # of the noise: the more of it there is, the better it is known
        assert by_time[0] == max(by_time)
        assert by_time[0] > 2 * by_time[-1]
    assert [event.value for event in events.Scalars("held_out_loss/0-0.25")] == pytest.approx(
        [by_time[0] for by_time in held_out.values()]
    )
    # previews are functions of the weights alone: the same again after a resume
    train(toy("again", steps=20, keep=1, preview=12, checkpoint_every=20), 0)
    assert read_scores(run_dir(toy("again"), 0)) == [{"step": 20, "frechet_distance": scores[20]}]
    again = json.loads((run_dir(toy("again"), 0) / "held-out.jsonl").read_text())
    assert again["loss"] == held_out[20]


def test_a_run_that_goes_on_is_the_same_run_in_wandb_and_shows_its_previews(
    toy: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb is not installed for the tests: a module in its place writes down what it is called with."""
    begun: list[dict[str, Any]] = []
    logged: list[tuple[dict[str, Any], int]] = []

    def begin(**options: Any) -> Any:
        begun.append(options)
        return SimpleNamespace(log=lambda values, step=None: logged.append((values, step)), finish=lambda: None)

    fake = ModuleType("wandb")
    fake.__spec__ = ModuleSpec("wandb", None)
    fake.init, fake.Image, fake.config = begin, lambda image: image.shape, SimpleNamespace(update=lambda *_, **__: None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    for name, steps in (("one", 2), ("one", 4), ("other", 2)):
        train(toy(name, steps=steps, preview=4, checkpoint_every=2, trackers=["wandb"]), 0)
    assert begun[0] == begun[1]
    assert begun[0]["resume"] == "allow"
    assert begun[0]["id"] != begun[2]["id"]
    images = [(values["preview"], step) for values, step in logged if "preview" in values]
    assert [step for _, step in images] == [2, 4, 2]
    assert all(len(shape) == 3 and shape[-1] == 3 for ((shape,), _) in images)


def test_an_unknown_tracker_is_refused(toy: Callable[..., Recipe]) -> None:
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(UserError, match=r"names wandb, which is not installed; install nestgen\[wandb\]"):
            train(toy(trackers=["wandb"]), 0)
