"""Which denoisers a sampling takes, and which settings: those of the recipe and of the command, of one checkpoint to its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from nestgen.cli.main import main
from nestgen.files import read_json
from nestgen.recipe.locations import run_dir
from nestgen.recipe.recipe import Recipe, load_recipe
from nestgen.runs import scores
from nestgen.runs.checkpoint import newest, write_checkpoint
from nestgen.sampling import card as cards
from nestgen.sampling import sample as sampling
from tests.nestgen.samples import files, sample_folder


@pytest.fixture
def recipe(trained: Callable[..., Path]) -> Recipe:
    return load_recipe(trained())


def test_command_samples_with_the_recipes_defaults(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe.root)
    run = CliRunner().invoke(main, ["sample", "--count", "2", "--depth", "2", "--out", "s"])
    assert run.exit_code == 0, run.output
    assert "2 samples of 2 level(s) in s" in run.output
    card = read_json(tmp_path / "s" / "sample.json")
    assert (card["seed"], card["batch"], card["depth"]) == (0, 64, 2)
    run = CliRunner().invoke(main, ["sample", "--count", "2", "--depth", "2", "--out", "s", "--set", "steps=[4, 5]"])
    assert run.exit_code == 1
    assert "s holds samples of other settings: z_0.steps was 5 and is 4;" in run.output
    again = ["sample", "--count", "2", "--depth", "2", "--out", "s", "--set", "steps=[4, 5]", "--overwrite"]
    run = CliRunner().invoke(main, again)
    assert run.exit_code == 0, run.output
    assert "s: z_0 is sampled again, because z_0.steps was 5 and is 4" in run.output
    for wrong, sentence in (
        ("stps=4", "sampling.stps is not a key"),
        ("steps=[", "--set steps line 1 is not valid YAML"),
    ):
        run = CliRunner().invoke(main, ["sample", "--out", "s", "--set", wrong])
        assert run.exit_code == 1
        assert sentence in run.output.splitlines()[-1]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_checkpoint_is_held_from_beginning_to_end(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """A training writes newer ones as soon as the sampling has begun."""
    recipe = recipe.with_sampling({"steps": 2})
    expected = files(sample_folder(recipe, tmp_path / "before"))

    def write_newer(*arguments: Any) -> dict[str, Any]:
        card = cards.make_card(*arguments)
        for level in range(3):
            copy_as_step(run_dir(recipe, level), 8)
        return card

    monkeypatch.setattr(sampling, "make_card", write_newer)
    out = sample_folder(recipe, tmp_path / "beside", processes=processes)
    assert files(out) == expected
    assert [level["checkpoint_step"] for level in read_json(out / "sample.json")["levels"]] == [7, 7, 7]


def copy_as_step(run: Path, step: int) -> None:
    """Writes another checkpoint of a run, with other weights."""
    checkpoint = newest(run)
    assert checkpoint is not None
    weights = {name: tensor + 0.01 for name, tensor in checkpoint.load("ema").items()}
    write_checkpoint(run, {"ema": weights}, checkpoint.meta | {"step": step})


def test_command_samples_from_a_step_or_the_best(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe.root)
    top = run_dir(recipe.depth(1), 0)
    copy_as_step(top, 8)
    copy_as_step(top, 9)

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(main, ["sample", "--count=2", "--depth=1", "--set=steps=2", *arguments])

    assert "has no previews, so none of its checkpoints is the best" in run("--step=best", "--out=best").output
    scores.append(top, 7, 2.0)
    scores.append(top, 8, 1.0)
    for step, found in (("best", 8), ("7", 7), (None, 9)):
        result = run(*([] if step is None else [f"--step={step}"]), f"--out=step-{step}")
        assert result.exit_code == 0, result.output
        assert read_json(tmp_path / f"step-{step}/sample.json")["levels"][0]["checkpoint_step"] == found
    assert "has no checkpoint of step 5, that was asked for (it has 7, 8, 9)" in run("--step=5", "--out=x").output
    assert "'last' is neither a step number nor `best`" in run("--step=last", "--out=x").output
