"""Sampling: what an image depends on, and that runs go on where they stopped."""

from __future__ import annotations

import re
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nestgen.errors import UserError
from nestgen.files import read_json
from nestgen.images import read_images
from nestgen.pipeline import NestedPipeline
from nestgen.recipe.locations import run_dir
from nestgen.recipe.recipe import Recipe, load_recipe
from nestgen.sampling import card as cards
from nestgen.sampling import descent, latents
from nestgen.sampling import sample as sampling
from nestgen.sampling.decoder import load_decoder
from nestgen.sampling.trained import load_samplers
from tests.nestgen.checkpoints import rewrite
from tests.nestgen.samples import files, levels, sample_folder
from tests.nestgen.training_runs import SHRINK

Trained = Callable[..., Path]
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("error::tqdm.TqdmWarning")  # of a bar beyond its end


@pytest.fixture
def recipe(trained: Trained) -> Recipe:
    return load_recipe(trained())


def test_writes_pictures_latents_card_and_a_sheet_beside(recipe: Recipe, tmp_path: Path) -> None:
    out = sample_folder(recipe, tmp_path / "s", count=4)
    assert sorted(path.name for path in out.glob("*.png")) == [f"{i:06d}.png" for i in range(4)]
    assert (tmp_path / "s-sheet.png").is_file()
    z_0 = levels(out)[0]
    expected = np.clip(np.rint((z_0 + 1) * 127.5), 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(read_images(out, 4), expected)
    card = read_json(out / "sample.json")
    assert (card["count"], card["seed"], card["depth"]) == (4, 0, 3)
    assert [(level["sampler"], level["steps"]) for level in card["levels"]] == [("dpm++-single", 5)] * 3
    assert [level["guidance"] for level in card["levels"]] == [1.0, 1.0, None]
    assert [level["condition_sigma"] for level in card["levels"]] == [0.5, 0.5, 0.0]
    assert [level["checkpoint_step"] for level in card["levels"]] == [7, 7, 7]


def test_an_image_does_not_depend_on_the_batch(recipe: Recipe, tmp_path: Path) -> None:
    recipe = recipe.with_sampling({"steps": 2})
    whole = levels(sample_folder(recipe, tmp_path / "whole", count=64, batch=64))
    for batch, count in ((7, 64), (1, 5)):
        out = sample_folder(recipe, tmp_path / f"by-{batch}", count=count, batch=batch)
        for one, other in zip(whole, levels(out)):
            assert np.abs(one[:count] - other).max() < 1e-4 * one.std()  # the stated tolerance
        pictures = [read_images(folder, count).astype(int) for folder in (tmp_path / "whole", out)]
        assert np.abs(pictures[0] - pictures[1]).max() <= 1  # a value half way between two may round either way


def test_equal_batches_are_equal_to_the_bit(recipe: Recipe, tmp_path: Path) -> None:
    assert files(sample_folder(recipe, tmp_path / "a")) == files(sample_folder(recipe, tmp_path / "b"))


def test_images_and_seeds_differ(recipe: Recipe, tmp_path: Path) -> None:
    pictures = np.concatenate(
        [read_images(sample_folder(recipe, tmp_path / str(seed), count=3, seed=seed), 3) for seed in (0, 1)]
    )
    assert len(np.unique(pictures, axis=0)) == 6


@pytest.mark.parametrize("writes", [0, 1, 2, 4, 8])
def test_an_interrupted_run_goes_on(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """Cut between a block and its record, after some records; then run again, with another batch allowed."""
    whole = files(sample_folder(recipe, tmp_path / "whole"))
    left = iter(range(writes))
    write = latents.write_json

    def die(path: Path, document: dict[str, Any]) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(path, document)

    with monkeypatch.context() as patch:
        patch.setattr(latents, "write_json", die)
        with pytest.raises(KeyboardInterrupt):
            sample_folder(recipe, tmp_path / "cut")
    records = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").rglob("*.blocks/*.json")}
    assert len(records) == writes
    assert not (tmp_path / "cut" / "sample.json").exists()
    sample_folder(recipe, tmp_path / "cut")
    assert files(tmp_path / "cut") == whole
    assert {path: path.stat().st_mtime_ns for path in records} == records  # what was there was not drawn again


def test_a_killed_process_goes_on(recipe: Recipe, tmp_path: Path, begin: Callable) -> None:
    whole = files(sample_folder(recipe, tmp_path / "whole", count=40, batch=2))
    out = tmp_path / "killed"
    command = ("nestgen", "sample", "--count", 40, "--batch-size", 2, "--out", out)
    process = begin(recipe.root, *command, before=SHRINK).process
    while len(list(out.rglob("*.blocks/*.json"))) < 5 and process.is_alive():
        time.sleep(0.002)
    process.kill()
    process.join()
    assert 0 < len(list(out.rglob("*.blocks/*.json"))) < 60
    sample_folder(recipe, out, count=40, batch=2)
    for one, other in zip(levels(tmp_path / "whole"), levels(out)):
        assert np.abs(one - other).max() < 1e-4 * one.std()  # another process may round otherwise
    assert files(out).keys() == whole.keys()


def test_another_batch_goes_on_with_the_blocks_there(recipe: Recipe, tmp_path: Path) -> None:
    whole = levels(sample_folder(recipe, tmp_path / "whole"))
    out = sample_folder(recipe, tmp_path / "s")
    for record in (*out.glob("latents/z1.blocks/000003.json"), *out.glob("latents/z0.blocks/*.json")):
        record.unlink()
    for batch in (2, 5):
        sample_folder(recipe, out, batch=batch)
        for one, other in zip(whole, levels(out)):
            assert np.abs(one - other).max() < 1e-4 * one.std()


def test_missing_pictures_are_decoded_again(recipe: Recipe, tmp_path: Path) -> None:
    out = sample_folder(recipe, tmp_path / "s")
    whole, card = files(out), (out / "sample.json").read_text()
    (out / "000002.png").unlink()
    sample_folder(recipe, out)
    assert files(out) == whole
    (out / "sample.json").unlink()  # as Snakemake does with the output of a step that was cut short
    sample_folder(recipe, out)
    assert files(out) == whole
    assert (out / "sample.json").read_text() == card


def test_a_whole_folder_is_left_as_it_is(recipe: Recipe, tmp_path: Path) -> None:
    out = sample_folder(recipe, tmp_path / "s")
    whole = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]
    times = {path: path.stat().st_mtime_ns for path in whole}
    sample_folder(recipe, out)
    assert {path: path.stat().st_mtime_ns for path in whole} == times


def test_images_that_a_power_cut_emptied_are_decoded_again(recipe: Recipe, tmp_path: Path) -> None:
    out = sample_folder(recipe, tmp_path / "s")
    whole = files(out)
    (out / "000001.png").write_bytes(b"")
    (out / "000005.png").write_bytes(whole["000005.png"][:-5])
    sample_folder(recipe, out)
    assert files(out) == whole


def test_a_flip_in_an_image_is_named(recipe: Recipe, tmp_path: Path) -> None:
    out = sample_folder(recipe, tmp_path / "s", count=2)
    image = out / "000001.png"
    content = image.read_bytes()
    for place in range(8, len(content) - 12, 3):
        image.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(UserError, match=r"000001\.png is damaged; remove it and run `nestgen sample` again"):
            read_images(out, 2)


def test_a_folder_of_other_things_is_left_alone(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").touch()
    with pytest.raises(UserError, match="holds no samples"):
        sample_folder(recipe, tmp_path / "photos")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["a.jpg"]


def times_of(out: Path, level: int) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob(f"latents/z{level}.blocks/*.json")}


def test_a_changed_level_is_sampled_again_with_those_below_only(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = sample_folder(recipe, tmp_path / "s")
    whole, top, middle = files(out), times_of(out, 2), times_of(out, 1)
    capsys.readouterr()
    other = recipe.with_sampling({"steps": 5, "guidance": [1.0, 0.5, 1.0]})
    with pytest.raises(
        UserError, match=r"holds samples of other settings: z_1.guidance was 1.0 and is 0.5; sample into"
    ):
        sample_folder(other, out)
    assert files(out) == whole
    sample_folder(other, out, overwrite=True)
    assert f"{out}: z_1 and below are sampled again, because z_1.guidance was 1.0 and is 0.5" in capsys.readouterr().out
    assert times_of(out, 2) == top
    assert files(out) == files(sample_folder(other, tmp_path / "fresh"))
    assert read_json(out / "sample.json")["levels"][1]["guidance"] == 0.5
    middle = times_of(out, 1)
    sample_folder(recipe.with_sampling({"steps": [4, 5, 5], "guidance": [1.0, 0.5, 1.0]}), out, overwrite=True)
    assert "z_0 is sampled again, because z_0.steps was 5 and is 4" in capsys.readouterr().out
    assert (times_of(out, 2), times_of(out, 1)) == (top, middle)
    sample_folder(recipe, out, overwrite=True)
    assert files(out) == whole


def test_new_weights_redraw_what_depends_on_them(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = sample_folder(recipe, tmp_path / "s")
    top, before = times_of(out, 2), read_images(out, 7)
    rewrite(run_dir(recipe, 1), lambda tensors: tensors["final_layer.bias"].add_(0.1))
    with pytest.raises(UserError, match=r"z_1.checkpoint_sha256 was .* or give --overwrite to replace them"):
        sample_folder(recipe, out)
    assert np.array_equal(read_images(out, 7), before)
    sample_folder(recipe, out, overwrite=True)
    assert "z_1 and below are sampled again, because z_1.checkpoint_sha256 was" in capsys.readouterr().out
    assert times_of(out, 2) == top
    assert files(out) == files(sample_folder(recipe, tmp_path / "fresh"))
    assert not np.array_equal(read_images(out, 7), before)


def test_another_seed_or_depth_leaves_nothing_of_before(recipe: Recipe, tmp_path: Path) -> None:
    out = sample_folder(recipe, tmp_path / "s")
    for other, options in ((recipe, {"seed": 1}), (recipe.depth(2), {})):
        with pytest.raises(UserError, match="holds samples of other settings"):
            sample_folder(other, out, **options)
    sample_folder(recipe, out, seed=1, overwrite=True)
    assert files(out) == files(sample_folder(recipe, tmp_path / "seed", seed=1))
    sample_folder(recipe.depth(2), out, overwrite=True)
    assert files(out) == files(sample_folder(recipe.depth(2), tmp_path / "two"))


def test_more_images_are_added_and_fewer_refused(recipe: Recipe, tmp_path: Path) -> None:
    out = sample_folder(recipe, tmp_path / "s", count=5)  # blocks of 3 and 2
    first = times_of(out, 2)["000000.json"]
    sample_folder(recipe, out, count=7)
    assert files(out) == files(sample_folder(recipe, tmp_path / "fresh"))
    assert times_of(out, 2)["000000.json"] == first
    assert read_json(out / "sample.json")["count"] == 7
    with pytest.raises(UserError, match="holds 7 samples and this run asks for 5"):
        sample_folder(recipe, out, count=5)


@pytest.mark.parametrize("writes", [1, 3, 7])
def test_a_redraw_that_is_interrupted_mixes_nothing(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """Cut anywhere in it, then finished with the new settings or with the old ones."""
    other = recipe.with_sampling({"steps": [5, 4, 5]})
    olds, news = files(sample_folder(recipe, tmp_path / "old")), files(sample_folder(other, tmp_path / "new"))
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
                sample_folder(other, out, overwrite=True)
        sample_folder(final, out, overwrite=True)
        assert files(out) == expected


def test_two_processes_draw_the_same(recipe: Recipe, tmp_path: Path) -> None:
    one = sample_folder(recipe, tmp_path / "one")
    assert files(sample_folder(recipe, tmp_path / "two", processes=2)) == files(one)
    assert read_json(tmp_path / "two" / "sample.json") == read_json(one / "sample.json")


def test_upper_levels_are_sampled_many_at_once_and_to_the_same_bits_after_an_interruption(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """z_1 has 5 tokens where z_0 has 17: three blocks at once, where there are three, and the rest one by one."""
    recipe = load_recipe(trained(levels=({"shape": "8x8x3"}, {"shape": "4x4x6", "sigma": 0.5}), sampling={"steps": 2}))
    batches: list[int] = []
    sample_images = descent.sample_images

    def counted(samplers: Any, indices: Any, *arguments: Any) -> Any:
        if samplers[0].level == 1:
            batches.append(len(indices))
        return sample_images(samplers, indices, *arguments)

    monkeypatch.setattr(descent, "sample_images", counted)
    whole = sample_folder(recipe, tmp_path / "whole", count=17, batch=2)
    assert batches == [6, 6, 2, 2, 1]
    before = files(whole)
    records = sorted(whole.glob("latents/z1.blocks/*.json"))
    assert len(records) == 9
    records[1].unlink()
    records[8].unlink()
    times = times_of(whole, 1)
    sample_folder(recipe, whole, count=17, batch=2)
    assert batches[5:] == [6, 1]
    assert re.search(r"z_1  59%\|.*\| 10/17 ", bars := capsys.readouterr().err) and not re.search(
        r"-[\d.]+ images/s", bars
    )
    assert files(whole) == before
    assert times.items() <= times_of(whole, 1).items()
    pipe = NestedPipeline(recipe, load_samplers(recipe, CPU), load_decoder({"name": "pixels", "scale": 1.0}))
    latents = pipe(num_images=17, seed=0, batch=2, progress=False).latents
    assert batches[7:] == batches[:5]
    for level, z_NHWC in enumerate(levels(whole, 2)):
        np.testing.assert_array_equal(latents[level].permute(0, 2, 3, 1).numpy(), z_NHWC)
    small = levels(sample_folder(recipe, tmp_path / "small", count=3, batch=2), 2)
    for one, other in zip(levels(whole, 2), small):
        assert np.abs(one[:3] - other).max() < 1e-4 * one.std()


@given(count=st.integers(1, 300), block=st.integers(1, 40), images=st.integers(1, 200))
def test_runs_of_blocks_hold_every_row_once_and_only_whole_runs_are_long(count: int, block: int, images: int) -> None:
    rows = [range(first, min(first + block, count)) for first in range(0, count, block)]
    runs = descent.together(rows, images)
    assert [index for run in runs for index in run] == list(range(count))
    full = max(1, images // len(rows[0])) * len(rows[0])
    assert {len(run) for run in runs} <= {full, len(rows[0]), len(rows[-1])}
    assert sum(len(run) == full for run in runs) >= count // full


def test_bfloat16_samples_nearly_the_same_and_the_card_says_so(recipe: Recipe, tmp_path: Path) -> None:
    exact, half = recipe, recipe.with_sampling({"precision": "bf16"})
    folders = [sample_folder(one, tmp_path / f"{i}", count=4) for i, one in enumerate((exact, half))]
    apart = [np.abs(one - other).max() / one.std() for one, other in zip(*map(levels, folders))]
    assert all(1e-4 < one < 0.5 for one in apart), apart
    cards_ = [read_json(folder / "sample.json")["levels"] for folder in folders]
    assert [level.get("precision") for card in cards_ for level in card] == [None] * 3 + ["bf16"] * 3
    with pytest.raises(UserError, match=r"holds samples of other settings: z_2\.precision was None and is bf16"):
        sample_folder(half, folders[0], count=4)


def test_bad_states_are_one_sentence(recipe: Recipe, trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no label 0: the denoisers have no classes"):
        sample_folder(recipe, tmp_path / "s", label=0)
    sigma = recipe.levels[1].model_copy(update={"sigma": 1.0})
    changed = recipe.model_copy(update={"levels": (recipe.levels[0], sigma, recipe.levels[2])})
    with pytest.raises(UserError, match=r"no trained denoiser in .*z0-given-z1-sigma1;"):
        sample_folder(changed, tmp_path / "s")
    shutil.copytree(run_dir(recipe, 0), run_dir(changed, 0))
    with pytest.raises(UserError, match=r"was trained with levels\[1\]\.sigma 0\.5, but in .* it is 1\.0"):
        sample_folder(changed, tmp_path / "s")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "000000.png").touch()
    with pytest.raises(UserError, match="is not empty and holds no samples to go on with"):
        sample_folder(recipe, tmp_path / "full")
    stores = load_samplers(recipe, CPU)[1].trained.meta["stores"]
    rewrite(run_dir(recipe, 1), stores={**stores, "z1": "0" * 64})
    with pytest.raises(UserError, match="were trained on different stores of z_1"):
        sample_folder(recipe, tmp_path / "s")
    rewrite(run_dir(recipe, 1), stores=stores)
    shutil.rmtree(run_dir(recipe, 2))
    with pytest.raises(UserError, match=r"no trained denoiser in .*z2-top; run `nestgen train --level 2`"):
        sample_folder(recipe, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_diverged_denoiser_is_named(recipe: Recipe, tmp_path: Path) -> None:
    rewrite(run_dir(recipe, 1), lambda tensors: tensors["final_layer.bias"].fill_(torch.nan))
    with pytest.raises(UserError, match=r"z1 of images 0 to 2 came out not finite; its denoiser has diverged"):
        sample_folder(recipe, tmp_path / "s")


def test_latents_that_the_disk_has_no_room_for_are_refused(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 4 * (8 * 8 * 3 + 4 * 4 * 6 + 2 * 2 * 4)  # of an image's latents
    monkeypatch.setattr(sampling, "free_bytes", lambda path: 7 * size - 1)
    with pytest.raises(
        UserError, match=r"latents of 7 samples take 8\.51e-06 GB more, .* 8\.51e-06 GB left; sample fewer"
    ):
        sample_folder(recipe, tmp_path / "s")
    assert not (tmp_path / "s").exists()
    sample_folder(recipe, tmp_path / "s", count=6)
    sample_folder(recipe, tmp_path / "s")  # of which it has most


@pytest.mark.parametrize("limit", [0, 100, 200, 500])
def test_a_full_disk_is_named_and_the_same_command_goes_on(recipe: Recipe, tmp_path: Path, limit: int) -> None:
    whole = files(sample_folder(recipe, tmp_path / "whole"))
    out = tmp_path / "s"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # the system refuses larger files
    try:
        with pytest.raises(UserError, match=rf"cannot write {out}/.* \(.*\); make room there"):
            sample_folder(recipe, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    sample_folder(recipe, out)
    assert files(out) == whole
