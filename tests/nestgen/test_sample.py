"""Sampling: what an image depends on, and that runs go on where they stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from nestgen import cards, latents, noise
from nestgen.cards import Request
from nestgen.cli import main
from nestgen.draw import labels_of, sample_below
from nestgen.errors import UserError
from nestgen.files import read_json
from nestgen.latents import open_latents
from nestgen.models import Given, Model, load_models
from nestgen.recipe import Recipe, load_recipe, run_dir
from nestgen.sample import sample
from nestgen.sheet import read_pictures

Trained = Callable[..., Path]
CPU = torch.device("cpu")


def draw(recipe: Recipe, out: Path, count: int = 7, seed: int = 0, batch: int = 3, **options: Any) -> Path:
    processes = options.pop("processes", 1)
    sample(recipe, out, Request(count, seed, batch, **options), processes)
    return out


def levels(out: Path, depth: int = 3) -> list[np.ndarray]:
    return [open_latents(out, level).read_all() for level in range(depth)]


def files(out: Path) -> dict[str, bytes]:
    """Every file of a sample folder but the card, whose batch may differ."""
    paths = [path for path in out.rglob("*") if path.is_file() and path.name != "sample.json"]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def recipe(trained: Trained) -> Recipe:
    return load_recipe(trained())


def test_writes_pictures_latents_card_and_a_sheet_beside(recipe: Recipe, tmp_path: Path) -> None:
    out = draw(recipe, tmp_path / "s", count=4)
    assert sorted(path.name for path in out.glob("*.png")) == [f"{i:06d}.png" for i in range(4)]
    assert (tmp_path / "s-sheet.png").is_file()
    z_0 = levels(out)[0]
    expected = np.clip(np.rint((z_0 + 1) * 127.5), 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(read_pictures(out, 4), expected)
    card = read_json(out / "sample.json")
    assert (card["count"], card["seed"], card["depth"]) == (4, 0, 3)
    assert [(level["sampler"], level["steps"]) for level in card["levels"]] == [("dpm++-single", 5)] * 3
    assert [level["guidance"] for level in card["levels"]] == [1.0, 1.0, None]
    assert [level["condition_sigma"] for level in card["levels"]] == [0.5, 0.5, 0.0]
    assert [level["checkpoint_step"] for level in card["levels"]] == [7, 7, 7]


def test_an_image_does_not_depend_on_the_batch(recipe: Recipe, tmp_path: Path) -> None:
    recipe = recipe.with_sampling({"steps": 2})
    whole = levels(draw(recipe, tmp_path / "whole", count=64, batch=64))
    for batch, count in ((7, 64), (1, 5)):
        out = draw(recipe, tmp_path / f"by-{batch}", count=count, batch=batch)
        for one, other in zip(whole, levels(out)):
            assert np.abs(one[:count] - other).max() < 1e-4 * one.std()  # the stated tolerance
        pictures = [read_pictures(folder, count).astype(int) for folder in (tmp_path / "whole", out)]
        assert np.abs(pictures[0] - pictures[1]).max() <= 1  # a value half way between two may round either way


def test_equal_batches_are_equal_to_the_bit(recipe: Recipe, tmp_path: Path) -> None:
    assert files(draw(recipe, tmp_path / "a")) == files(draw(recipe, tmp_path / "b"))


def test_images_and_seeds_differ(recipe: Recipe, tmp_path: Path) -> None:
    pictures = np.concatenate(
        [read_pictures(draw(recipe, tmp_path / str(seed), count=3, seed=seed), 3) for seed in (0, 1)]
    )
    assert len(np.unique(pictures, axis=0)) == 6


@pytest.mark.parametrize("writes", [0, 1, 2, 4, 8])
def test_an_interrupted_run_goes_on(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """Cut between a block and its record, after some records; then run again, with another batch allowed."""
    whole = files(draw(recipe, tmp_path / "whole"))
    left = iter(range(writes))
    write = latents.write_json

    def die(path: Path, document: dict[str, Any]) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(path, document)

    with monkeypatch.context() as patch:
        patch.setattr(latents, "write_json", die)
        with pytest.raises(KeyboardInterrupt):
            draw(recipe, tmp_path / "cut")
    records = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").rglob("*.blocks/*.json")}
    assert len(records) == writes
    assert not (tmp_path / "cut" / "sample.json").exists()
    draw(recipe, tmp_path / "cut")
    assert files(tmp_path / "cut") == whole
    assert {path: path.stat().st_mtime_ns for path in records} == records  # what was there was not drawn again


def test_a_killed_process_goes_on(recipe: Recipe, tmp_path: Path) -> None:
    whole = files(draw(recipe, tmp_path / "whole", count=40, batch=2))
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "nestgen", "sample", "--count", "40", "--batch-size", "2", "--out", str(out)]
    process = subprocess.Popen(
        command, cwd=recipe.root, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while len(list(out.rglob("*.blocks/*.json"))) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(list(out.rglob("*.blocks/*.json"))) < 60
    draw(recipe, out, count=40, batch=2)
    for one, other in zip(levels(tmp_path / "whole"), levels(out)):
        assert np.abs(one - other).max() < 1e-4 * one.std()  # another process may round otherwise
    assert files(out).keys() == whole.keys()


def test_another_batch_goes_on_with_the_blocks_there(recipe: Recipe, tmp_path: Path) -> None:
    whole = levels(draw(recipe, tmp_path / "whole"))
    out = draw(recipe, tmp_path / "s")
    for record in (*out.glob("latents/z1.blocks/000003.json"), *out.glob("latents/z0.blocks/*.json")):
        record.unlink()
    for batch in (2, 5):
        draw(recipe, out, batch=batch)
        for one, other in zip(whole, levels(out)):
            assert np.abs(one - other).max() < 1e-4 * one.std()


def test_missing_pictures_are_decoded_again(recipe: Recipe, tmp_path: Path) -> None:
    out = draw(recipe, tmp_path / "s")
    whole, card = files(out), (out / "sample.json").read_text()
    (out / "000002.png").unlink()
    draw(recipe, out)
    assert files(out) == whole
    (out / "sample.json").unlink()  # as Snakemake does with the output of a step that was cut short
    draw(recipe, out)
    assert files(out) == whole
    assert (out / "sample.json").read_text() == card


def test_a_whole_folder_is_left_as_it_is(recipe: Recipe, tmp_path: Path) -> None:
    out = draw(recipe, tmp_path / "s")
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    draw(recipe, out)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == times


def times_of(out: Path, level: int) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob(f"latents/z{level}.blocks/*.json")}


def test_a_changed_level_is_drawn_anew_with_those_below_only(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = draw(recipe, tmp_path / "s")
    whole, top, middle = files(out), times_of(out, 2), times_of(out, 1)
    capsys.readouterr()
    other = recipe.with_sampling({"steps": 5, "guidance": [1.0, 0.5, 1.0]})
    draw(other, out)
    assert f"{out}: z_1 and below are drawn anew, because z_1.guidance was 1.0 and is 0.5" in capsys.readouterr().out
    assert times_of(out, 2) == top
    assert files(out) == files(draw(other, tmp_path / "fresh"))
    assert read_json(out / "sample.json")["levels"][1]["guidance"] == 0.5
    middle = times_of(out, 1)
    draw(recipe.with_sampling({"steps": [4, 5, 5], "guidance": [1.0, 0.5, 1.0]}), out)
    assert "z_0 is drawn anew, because z_0.steps was 5 and is 4" in capsys.readouterr().out
    assert (times_of(out, 2), times_of(out, 1)) == (top, middle)
    draw(recipe, out)
    assert files(out) == whole


def test_new_weights_redraw_what_depends_on_them(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = draw(recipe, tmp_path / "s")
    top, before = times_of(out, 2), read_pictures(out, 7)
    weights = run_dir(recipe, 1) / "checkpoints" / "00000007" / "ema.safetensors"
    tensors = load_file(weights)
    tensors["final_layer.bias"] += 0.1
    save_file(tensors, weights)
    draw(recipe, out)
    assert "z_1 and below are drawn anew, because z_1.checkpoint_sha256 was" in capsys.readouterr().out
    assert times_of(out, 2) == top
    assert files(out) == files(draw(recipe, tmp_path / "fresh"))
    assert not np.array_equal(read_pictures(out, 7), before)


def test_another_seed_or_depth_leaves_nothing_of_before(recipe: Recipe, tmp_path: Path) -> None:
    out = draw(recipe, tmp_path / "s")
    draw(recipe, out, seed=1)
    assert files(out) == files(draw(recipe, tmp_path / "seed", seed=1))
    draw(recipe.depth(2), out)
    assert files(out) == files(draw(recipe.depth(2), tmp_path / "two"))


def test_more_images_are_added_and_fewer_refused(recipe: Recipe, tmp_path: Path) -> None:
    out = draw(recipe, tmp_path / "s", count=5)  # blocks of 3 and 2
    first = times_of(out, 2)["000000.json"]
    draw(recipe, out, count=7)
    assert files(out) == files(draw(recipe, tmp_path / "fresh"))
    assert times_of(out, 2)["000000.json"] == first
    assert read_json(out / "sample.json")["count"] == 7
    with pytest.raises(UserError, match="holds 7 samples and this run asks for 5"):
        draw(recipe, out, count=5)


@pytest.mark.parametrize("writes", [1, 3, 7])
def test_a_redraw_that_is_interrupted_mixes_nothing(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """Cut anywhere in it, then finished with the new settings or with the old ones."""
    other = recipe.with_sampling({"steps": [5, 4, 5]})
    olds, news = files(draw(recipe, tmp_path / "old")), files(draw(other, tmp_path / "new"))
    for final, expected in ((other, news), (recipe, olds)):
        out = tmp_path / f"cut-{final.sampling.steps}"
        shutil.copytree(tmp_path / "old", out)
        left = iter(range(writes))

        def die(path: Path, document: dict[str, Any], left: Any = left, write: Any = latents.write_json) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            write(path, document)

        with monkeypatch.context() as patch:
            patch.setattr(latents, "write_json", die)
            patch.setattr(cards, "write_json", die)
            with pytest.raises(KeyboardInterrupt):
                draw(other, out)
        draw(final, out)
        assert files(out) == expected


def test_two_processes_draw_the_same(recipe: Recipe, tmp_path: Path) -> None:
    one = draw(recipe, tmp_path / "one")
    assert files(draw(recipe, tmp_path / "two", processes=2)) == files(one)
    assert read_json(tmp_path / "two" / "sample.json") == read_json(one / "sample.json")


def test_noise_belongs_to_the_level_not_to_the_depth(recipe: Recipe, tmp_path: Path) -> None:
    """With denoisers that see nothing, z_0 is a function of its noise: the same at L = 1, 2, 3."""
    z_0 = []
    for depth in (1, 2, 3):
        models = load_models(recipe.depth(depth), CPU)
        for model in models:
            torch.nn.init.zeros_(model.weights.denoiser.final_layer.weight)
            torch.nn.init.zeros_(model.weights.denoiser.final_layer.bias)
        z_0.append(sample_below(models, range(4), 0, {})[0])
    torch.testing.assert_close(z_0[0], z_0[1], rtol=0, atol=0)
    torch.testing.assert_close(z_0[0], z_0[2], rtol=0, atol=0)


def test_frozen_levels_stay_and_decide_what_is_below(recipe: Recipe) -> None:
    models = load_models(recipe, CPU)
    free = sample_below(models, range(3), 0, {})
    for lowest in (1, 2):
        frozen = {level: free[level] for level in range(lowest, 3)}
        again = sample_below(models, range(3), 0, frozen)
        for level in range(3):
            torch.testing.assert_close(again[level], free[level], rtol=0, atol=0)
    frozen = {1: free[1].flip(0), 2: free[2]}
    other = sample_below(models, range(3), 0, frozen)
    assert other[1] is frozen[1]
    assert (other[0] - free[0]).abs().max() > 0.01  # z_0 is another: it was conditioned on another z_1


class Recorder(torch.nn.Module):
    """A denoiser that keeps what it is called with, and predicts from it."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.config = model.config
        self.pos_embed = model.weights.denoiser.pos_embed
        self.calls: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = []
        self.denoiser = model.weights.denoiser

    def forward(self, *inputs: Tensor, **given: Any) -> Tensor:
        self.calls.append((inputs, given))
        return self.denoiser(*inputs, **given)


def recording(model: Model) -> tuple[Model, Recorder]:
    recorder = Recorder(model)
    weights = replace(model.weights, denoiser=recorder)  # type: ignore[arg-type]
    return replace(model, weights=weights), recorder


def with_sampling(model: Model, **changes: Any) -> Model:
    return replace(model, sampling=replace(model.sampling, **changes))


def eps_of(model: Model, z: Tensor, told: float, given: Given) -> Tensor:
    """The guided noise prediction at n = told of the discrete process."""
    t = torch.tensor(told / 1000, dtype=torch.float64)
    process = model.weights.process
    x = model.denoise(given)(z, t)
    return (z - float(process.alpha(t)) * x) / float(process.sigma(t))


def test_guidance_is_the_formula_in_one_call(trained: Trained) -> None:
    recipe = load_recipe(trained(classes=4, denoiser={"size": "nano", "labels": 4}))
    model, recorder = recording(with_sampling(load_models(recipe, CPU)[1], guidance=0.7))
    z, above = noise.normal(0, "z", range(5), (6, 4, 4)), noise.normal(0, "above", range(5), (4, 2, 2))
    told, label = torch.full((5,), 300.0), torch.tensor([0, 1, 2, 3, 0])
    eps = eps_of(model, z, 300.0, Given((above,), label))
    assert len(recorder.calls) == 1
    kept = recorder.denoiser(z, told, above, torch.ones(5, dtype=torch.bool), label)
    null = recorder.denoiser(z, told, None, None, torch.full((5,), 4))
    torch.testing.assert_close(eps, 1.7 * kept - 0.7 * null, rtol=1e-4, atol=1e-5)
    assert (kept - null).abs().max() > 0.01
    for unguided in (0.0, None):
        eps = eps_of(with_sampling(model, guidance=unguided), z, 300.0, Given((above,), label))
        torch.testing.assert_close(eps, kept, rtol=1e-4, atol=1e-5)
        assert recorder.calls[-1][0][0] is z  # one batch, not two


@pytest.mark.parametrize(("classes", "top"), [(0, None), (4, 1.0)])
def test_the_top_is_guided_by_its_label_only(trained: Trained, classes: int, top: float | None) -> None:
    recipe = load_recipe(trained(classes=classes, denoiser={"size": "nano", "labels": classes}))
    assert [model.sampling.guidance for model in load_models(recipe, CPU)] == [1.0, 1.0, top]


def test_the_condition_is_noised_as_in_training(recipe: Recipe) -> None:
    models = load_models(recipe, CPU)
    z_1 = noise.normal(1, "test", range(200), (6, 4, 4))
    model, recorder = recording(with_sampling(models[0], guidance=0.0, steps=1))
    sample_below([model], range(200), 0, {1: z_1})
    (condition,) = recorder.calls[0][1]["condition"]
    added = condition - z_1
    assert abs(added.std() - 0.5) < 0.01
    for stream in ("sample/z0", "sample/z1"):  # independent of the noise that the levels start from
        level = noise.normal(0, stream, range(200), (6, 4, 4))
        assert abs(torch.corrcoef(torch.stack([added.flatten(), level.flatten()]))[0, 1]) < 0.03


@given(seed=st.integers(0, 2**31), first=st.integers(0, 10**6))
def test_labels_are_functions_of_seed_and_index(seed: int, first: int) -> None:
    class Classes:
        labels = 5

    models: Any = [Classes()]
    block = labels_of(models, range(first, first + 6), seed, None)
    one = labels_of(models, [first + 3], seed, None)
    assert block is not None
    assert one is not None
    assert block[3] == one[0]
    assert 0 <= int(block.min()) <= int(block.max()) < 5


def test_labels_reach_the_denoisers(trained: Trained, tmp_path: Path) -> None:
    recipe = load_recipe(trained(classes=4, denoiser={"size": "nano", "labels": 4}))
    models = load_models(recipe, CPU)
    drawn = labels_of(models, range(400), 0, None)
    assert drawn is not None
    assert torch.bincount(drawn).tolist() == pytest.approx([100] * 4, abs=35)
    free, asked = draw(recipe, tmp_path / "free"), draw(recipe, tmp_path / "asked", label=2)
    same = (drawn[:7] == 2).numpy()
    assert 0 < same.sum() < 7
    equal = [np.array_equal(one, other) for one, other in zip(levels(free)[2], levels(asked)[2])]
    assert equal == same.tolist()  # only the images of that class are the same
    with pytest.raises(UserError, match="no label 4: the denoisers know classes 0 to 3"):
        draw(recipe, tmp_path / "bad", label=4)


def test_guidance_holds_within_its_interval_and_decays_downwards(recipe: Recipe) -> None:
    changed = recipe.with_sampling(
        {"guidance": 2.0, "guidance_decay": 0.5, "guidance_interval": [None, [0.2, 0.6], None]}
    )
    models = load_models(changed, CPU)
    assert [model.sampling.guidance for model in models] == [0.5, 1.0, None]
    model, recorder = recording(models[1])
    z, given = noise.normal(0, "z", range(2), (6, 4, 4)), Given((noise.normal(0, "above", range(2), (4, 2, 2)),))
    for told, batch in ((150.0, 2), (200.0, 4), (600.0, 4), (650.0, 2)):
        eps_of(model, z, told, given)
        assert len(recorder.calls[-1][0][0]) == batch  # twice the images where it is guided


def test_sigma_at_sampling_is_its_own(recipe: Recipe, tmp_path: Path) -> None:
    changed = recipe.with_sampling({"sigma": [0, 0.25, None]})
    assert [model.sampling.sigmas for model in load_models(changed, CPU)] == [(0.25,), (0.5,), ()]
    draw(changed, tmp_path / "s")
    levels_of = read_json(tmp_path / "s" / "sample.json")["levels"]
    assert [level["condition_sigma"] for level in levels_of] == [0.25, 0.5, 0.0]


def test_autoguidance_leads_away_from_a_worse_denoiser(recipe: Recipe, tmp_path: Path) -> None:
    strong = run_dir(recipe, 2)
    earlier = strong.parent.parent / "weak" / strong.name
    shutil.copytree(strong, earlier)
    weights = earlier / "checkpoints" / "00000007" / "ema.safetensors"
    tensors = load_file(weights)
    tensors["final_layer.bias"] += 0.5
    save_file(tensors, weights)
    guided = recipe.with_sampling({"autoguide": [None, None, {"scale": 0.8, "run": "weak"}]})
    top = load_models(guided, CPU)[2]
    assert top.weak is not None
    z = noise.normal(0, "z", range(3), (4, 2, 2))
    eps, plain = eps_of(top, z, 500.0, Given()), eps_of(load_models(recipe, CPU)[2], z, 500.0, Given())
    torch.testing.assert_close(eps, plain - 0.8 * 0.5, rtol=1e-4, atol=1e-4)  # d + w (d - (d + 0.5))
    draw(guided, tmp_path / "s")
    assert read_json(tmp_path / "s" / "sample.json")["levels"][2]["autoguide"]["scale"] == 0.8
    for autoguide, sentence in (
        ({"scale": 1, "step": 5}, r"has no checkpoint of step 5, .* \(it has 7\)"),
        ({"scale": 1, "step": 7}, "has the weights it should guide"),
        ({"scale": 1, "run": "nowhere"}, r"no trained denoiser in .*nowhere"),
    ):
        with pytest.raises(UserError, match=sentence):
            load_models(recipe.with_sampling({"autoguide": [None, None, autoguide]}), CPU)


def test_all_levels_above_condition_where_the_denoisers_were_trained_so(trained: Trained, tmp_path: Path) -> None:
    options = {"size": "nano", "condition_on": "all", "sigma_told": True}
    recipe = load_recipe(trained(denoiser=options)).with_sampling({"sigma": [0, 0.3, 0.7], "steps": 2})
    models = load_models(recipe, CPU)
    assert [model.sampling.sigmas for model in models] == [(0.3, 0.7), (0.7,), ()]
    model, recorder = recording(with_sampling(models[0], guidance=0.5))
    above = {1: noise.normal(1, "1", range(50), (6, 4, 4)), 2: noise.normal(1, "2", range(50), (4, 2, 2))}
    sample_below([model], range(50), 0, above)
    (z, _), given = recorder.calls[0]
    assert len(z) == 100
    for level, sigma, noised in zip((1, 2), (0.3, 0.7), given["condition"], strict=True):
        assert abs(float((noised[:50] - above[level]).std()) - sigma) < 0.02
    assert given["sigma_BK"].unique(dim=0).tolist() == [pytest.approx([0.3, 0.7])]
    assert given["keep_B"].tolist() == [True] * 50 + [False] * 50
    draw(recipe, tmp_path / "s", count=2)
    assert read_json(tmp_path / "s" / "sample.json")["levels"][0]["further_sigmas"] == [0.7]


def test_bad_states_are_one_sentence(recipe: Recipe, trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no label 0: the denoisers know no classes"):
        draw(recipe, tmp_path / "s", label=0)
    sigma = recipe.levels[1].model_copy(update={"sigma": 1.0})
    changed = recipe.model_copy(update={"levels": (recipe.levels[0], sigma, recipe.levels[2])})
    with pytest.raises(UserError, match=r"no trained denoiser in .*z0-given-z1-sigma1;"):
        draw(changed, tmp_path / "s")
    shutil.copytree(run_dir(recipe, 0), run_dir(changed, 0))
    with pytest.raises(UserError, match=r"was trained with levels\[1\]\.sigma 0\.5, but in .* it is 1\.0"):
        draw(changed, tmp_path / "s")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "000000.png").touch()
    with pytest.raises(UserError, match="is not empty and holds no samples to go on with"):
        draw(recipe, tmp_path / "full")
    z_1 = run_dir(recipe, 1) / "checkpoints" / "00000007" / "meta.json"
    text = z_1.read_text()
    fingerprint = load_models(recipe, CPU)[1].weights.meta["stores"]["z1"]
    z_1.write_text(text.replace(fingerprint, "0" * 64))
    with pytest.raises(UserError, match="were trained on different stores of z_1"):
        draw(recipe, tmp_path / "s")
    z_1.write_text(text)
    shutil.rmtree(run_dir(recipe, 2))
    with pytest.raises(UserError, match=r"no trained denoiser in .*z2-top; run `nestgen train --level 2`"):
        draw(recipe, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_diverged_denoiser_is_named(recipe: Recipe, tmp_path: Path) -> None:
    weights = run_dir(recipe, 1) / "checkpoints" / "00000007" / "ema.safetensors"
    tensors = load_file(weights)
    tensors["final_layer.bias"].fill_(torch.nan)
    save_file(tensors, weights)
    with pytest.raises(UserError, match=r"z1 of images 0 to 2 came out not finite; its denoiser has diverged"):
        draw(recipe, tmp_path / "s")


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
    assert run.exit_code == 0, run.output
    assert "s: z_0 is drawn anew, because z_0.steps was 5 and is 4" in run.output
    for wrong, sentence in (
        ("stps=4", "sampling.stps is not a key"),
        ("steps=[", "--set steps line 1 is not valid YAML"),
    ):
        run = CliRunner().invoke(main, ["sample", "--out", "s", "--set", wrong])
        assert run.exit_code == 1
        assert sentence in run.output.splitlines()[-1]
