"""Which level loses quality, and which samples are training rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from nestgen import randomness
from nestgen.cli.main import main
from nestgen.files import read_json
from nestgen.recipe.recipe import Recipe, load_recipe
from nestgen.sampling.conditions import ImageConditions, Request, open_conditions
from nestgen.sampling.descent import sample_images
from nestgen.sampling.frozen import FrozenSource
from nestgen.sampling.latents import open_latents
from nestgen.sampling.sample import sample
from nestgen.sampling.trained import load_samplers
from nestgen.scoring.frechet import frechet_distance
from nestgen.scoring.memorisation import nearest_rows
from nestgen.stores.hierarchy import open_hierarchy
from tests.nestgen.captions import write_text

Trained = Callable[..., Path]


@pytest.fixture
def recipe(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    recipe = load_recipe(trained(sampling={"steps": 2}))
    sample(recipe, tmp_path / "s", Request(9, 0, 9))
    monkeypatch.chdir(tmp_path)
    return recipe


def flat(z: np.ndarray | torch.Tensor) -> np.ndarray:
    return np.asarray(z).reshape(len(z), -1)


def test_each_level_is_drawn_given_real_rows(recipe: Recipe, tmp_path: Path) -> None:
    run = CliRunner().invoke(main, ["diagnose", "--samples", "s"])
    assert run.exit_code == 0, run.output
    levels = {found["level"]: found for found in read_json(tmp_path / "diagnosis.json")["levels"]}
    stores = [store.load()[:, 0].astype(np.float32) for store in open_hierarchy(recipe)]
    samplers = load_samplers(recipe, torch.device("cpu"))
    for level in (0, 1, 2):
        drawn = open_latents(tmp_path / "s", level).read_all()
        assert levels[level]["generated"] == pytest.approx(frechet_distance(flat(drawn), flat(stores[level])), rel=1e-6)
    for level in (0, 1):
        above = torch.from_numpy(stores[level + 1][:9]).permute(0, 3, 1, 2)
        z = sample_images([samplers[level]], range(9), ImageConditions(0), {level + 1: above})
        given_true = z[level].permute(0, 2, 3, 1)
        expected = frechet_distance(flat(given_true), flat(stores[level]))
        assert levels[level]["true"] == pytest.approx(expected, rel=1e-4)
        assert levels[level]["gap"] == pytest.approx(levels[level]["generated"] - levels[level]["true"])
    assert levels[2]["true"] is None
    assert (tmp_path / "diagnosis.png").stat().st_size > 5000
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "diagnosis").rglob("*.blocks/*.json")}
    assert CliRunner().invoke(main, ["diagnose", "--samples", "s"]).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # nothing is drawn again


def test_samples_are_diagnosed_with_the_settings_they_were_drawn_with(recipe: Recipe, tmp_path: Path) -> None:
    sample(recipe.with_sampling({"steps": 1, "guidance": 0.5}), tmp_path / "other", Request(9, 0, 9))
    run = CliRunner().invoke(main, ["diagnose", "--samples", "other"])
    assert (run.exit_code, run.output.count("\n")) == (1, 1)
    assert "the samples of other were made with other settings: z_0.steps was 1 and is 2; give the --set" in run.output
    run = CliRunner().invoke(main, ["diagnose", "--samples", "other", "--set", "steps=1", "--set", "guidance=0.5"])
    assert run.exit_code == 0, run.output


def test_too_few_real_rows_are_said(recipe: Recipe, tmp_path: Path) -> None:
    sample(recipe, tmp_path / "many", Request(41, 0, 41))
    run = CliRunner().invoke(main, ["diagnose", "--samples", "many"])
    assert run.exit_code == 1
    assert "has 40 rows, and each of the 41 samples needs one of its own" in run.output.splitlines()[-1]


def test_one_sample_has_no_distance(recipe: Recipe, tmp_path: Path) -> None:
    sample(recipe, tmp_path / "one", Request(1, 0, 1))
    run = CliRunner().invoke(main, ["diagnose", "--samples", "one"])
    assert (run.exit_code, "1 vector(s) cannot be scored in z_2: two sets of 2 or more" in run.output) == (1, True)


def test_true_levels_have_their_images_captions(
    trained: Trained, tmp_path: Path, store_writer: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "stores" / "toy"
    text = write_text(root, store_writer, [1] * 40)
    recipe = load_recipe(trained(denoiser={"size": "nano", "text": "3x8"}, sampling={"steps": 2}))
    monkeypatch.chdir(tmp_path)
    sample(recipe, tmp_path / "s", Request(9, 0, 9, prompts=root))
    run = CliRunner().invoke(main, ["diagnose", "--samples", "s"])
    assert run.exit_code == 0, run.output
    samplers = load_samplers(recipe, torch.device("cpu"))
    conditions = open_conditions(recipe, samplers, Request(9, 0, 9, frozen=FrozenSource(1, root), prompts=root))
    np.testing.assert_array_equal(conditions.context(range(9)), text[1:10])
    z = sample_images(samplers, range(9), conditions)
    found = open_latents(tmp_path / "diagnosis" / "z0-given-true", 0).read_all()
    np.testing.assert_allclose(found, z[0].permute(0, 2, 3, 1), atol=1e-4)
    write_text(tmp_path / "loose", store_writer)
    run = CliRunner().invoke(main, ["diagnose", "--samples", "s", "--reference", "loose"])
    said = "loose has no captions of its images; make it by `featurize extract --text clip`"
    assert (run.exit_code, said in run.output) == (1, True)
    sample(recipe, tmp_path / "other", Request(9, 0, 9, prompts=tmp_path / "loose"))
    run = CliRunner().invoke(main, ["diagnose", "--samples", "other"])
    said = "the samples of other have captions that no real images have (prompt i of image i); diagnose samples of"
    assert (run.exit_code, said in run.output) == (1, True)


def test_nearest_rows_are_those_of_a_full_search(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nestgen.scoring.memorisation.BLOCK", 7)
    store = open_hierarchy(recipe)[1]
    queries = randomness.normal(3, "q", range(6), (6, 4, 4))
    real = torch.from_numpy(store.load()[:, 0].astype(np.float32)).permute(0, 3, 1, 2)
    full = torch.cdist(queries.flatten(1).double(), real.flatten(1).double())
    distance, row = nearest_rows(queries, store, 3, 0)
    torch.testing.assert_close(distance, full.topk(3, largest=False).values)
    assert row.equal(full.topk(3, largest=False).indices)
    own = nearest_rows(real[[4, 30]], store, 1, 0)
    assert own[1].flatten().tolist() == [4, 30]
    assert float(own[0].max()) < 1e-5


def test_memorised_rows_are_found_and_shown(recipe: Recipe, tmp_path: Path, store_writer: Callable[..., Path]) -> None:
    held_out = tmp_path / "stores" / "other"
    for level, store in enumerate(open_hierarchy(recipe)):
        values = store.load() + np.random.default_rng(level).normal(size=store.shape).astype("<f2") / 2
        rest = {key: store.attributes[key] for key in ("kind", "latent_shape", "codec") if key in store.attributes}
        keys = [f"other-{row}" for row in range(len(values))]
        store_writer(held_out / store.path.parent.name / store.path.name, values.astype("<f2"), keys=keys, **rest)
    latents = open_latents(tmp_path / "s", 0)
    rows = open_hierarchy(recipe)[0].load()[[5, 6, 7, 8, 9, 10, 11, 12, 13], 0].astype(np.float32)
    latents.write(range(9), torch.from_numpy(rows).permute(0, 3, 1, 2))
    run = CliRunner().invoke(main, ["nearest", "--samples", "s", "--reference", str(held_out), "--count", "4"])
    assert run.exit_code == 0, run.output
    levels = {found["level"]: found for found in read_json(tmp_path / "nearest.json")["levels"]}
    assert levels[0]["rows"] == [5, 6, 7, 8]
    assert levels[0]["nearer_than_held_out"] == 1.0
    assert levels[0]["held_out_median_distance"] > levels[0]["median_distance"]
    assert "z_0: median distance" in run.output
    assert (tmp_path / "nearest.png").stat().st_size > 1000
    assert CliRunner().invoke(main, ["nearest", "--samples", "s"]).exit_code == 0
    assert read_json(tmp_path / "nearest.json")["levels"][0]["nearer_than_held_out"] is None


def test_like_and_freeze_take_what_they_say(recipe: Recipe, tmp_path: Path) -> None:
    def drawn(*options: str) -> list[np.ndarray]:
        out = "-".join(options)
        run = CliRunner().invoke(main, ["sample", "--count", "5", "--batch-size", "3", "--out", out, *options])
        assert run.exit_code == 0, run.output
        return [open_latents(tmp_path / out, level).read_all() for level in range(3)]

    stores = [store.load()[:, 0].astype(np.float32) for store in open_hierarchy(recipe)]
    free = [open_latents(tmp_path / "s", level).read_all() for level in range(3)]
    like = drawn("--like", "7", "--freeze-from", "2")
    np.testing.assert_array_equal(like[2], stores[2][[7] * 5])
    assert len(np.unique(like[1], axis=0)) == 5
    each = drawn("--like", "each")
    for level in (1, 2):
        np.testing.assert_array_equal(each[level], stores[level][:5])
    frozen = drawn("--freeze-from", "1")
    for level in (1, 2):
        assert np.abs(frozen[level] - free[level][[0] * 5]).max() < 1e-4 * free[level].std()
    difference = np.abs(frozen[0] - free[0][:5])
    assert difference[0].max() < 1e-4 * free[0].std()
    assert difference[1:].max() > 0.01
    levels = read_json(tmp_path / "--like-7---freeze-from-2" / "sample.json")["levels"]
    assert levels[2]["frozen"]["row"] == 7
    assert "frozen" not in levels[1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--like", "40"), "has rows 0 to 39, not row 40"),
        (("--like", "each", "--count", "41"), "not a row for each of 41 images"),
        (("--freeze-from", "3"), "--freeze-from 3 is not within 1..2"),
        (("--like", "1", "--store", "nowhere"), "there is no store nowhere"),
    ],
)
def test_wrong_sources_are_one_sentence(recipe: Recipe, options: tuple[str, ...], sentence: str) -> None:
    run = CliRunner().invoke(main, ["sample", "--out", "x", "--count", "2", *options])
    assert run.exit_code == 1
    assert sentence in run.output
    assert run.output.count("\n") == 1
    assert not Path("x").exists()
