"""The hierarchy sheet: its rows, and that freezing more leaves less to vary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nestgen.cli.main import main
from nestgen.files import read_json
from nestgen.recipe.recipe import load_recipe
from nestgen.sampling.conditions import ImageConditions
from nestgen.sampling.decoder import to_uint8
from nestgen.sampling.descent import sample_images
from nestgen.sampling.trained import load_samplers
from nestgen.scoring.hierarchy_sheet import SheetOptions, hierarchy_sheet, slerp, variation
from nestgen.stores.hierarchy import open_hierarchy


def test_rows_freeze_from_the_top_and_share_the_first_picture(
    trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(trained())
    monkeypatch.chdir(recipe.root)
    run = CliRunner().invoke(main, ["hierarchy", "--columns", "5", "--seed", "3"])
    assert run.exit_code == 0, run.output
    card = read_json(tmp_path / "hierarchy.json")
    assert [row["frozen"] for row in card["rows"]] == [[], [2], [1, 2]]
    assert all(row["variation"] > 0 for row in card["rows"])
    assert (card["samples"]["seed"], card["samples"]["depth"]) == (3, 3)
    sheet = np.asarray(Image.open(tmp_path / "hierarchy.png"))
    rows = [sheet[4 + 100 * row :][:96, -500:-4][:, :96] for row in range(3)]  # first column, 8 px enlarged
    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(rows[0], rows[2])
    second = [sheet[4 + 100 * row :][:96, -400:-304] for row in range(3)]
    assert not np.array_equal(second[0], second[2])


def test_one_level_has_nothing_to_freeze(trained: Callable[..., Path], tmp_path: Path) -> None:
    hierarchy_sheet(load_recipe(trained()).depth(1), tmp_path / "h.png", columns=3, seed=0, options=SheetOptions())
    assert [row["frozen"] for row in read_json(tmp_path / "h.json")["rows"]] == [[]]


def test_variation_is_averaged_over_frozen_samples(trained: Callable[..., Path], tmp_path: Path) -> None:
    recipe = load_recipe(trained())
    hierarchy_sheet(recipe, tmp_path / "h.png", columns=6, seed=1, options=SheetOptions())
    samplers = load_samplers(recipe, torch.device("cpu"))
    z = sample_images(samplers, range(6), ImageConditions(1))
    expected = []
    for image in range(4):
        frozen = {level: torch.cat([z[level][image : image + 1]] * 6) for level in (1, 2)}
        expected.append(variation(to_uint8(sample_images(samplers, range(6), ImageConditions(1), frozen)[0])))
    rows = read_json(tmp_path / "h.json")["rows"]
    assert rows[0]["variation"] == pytest.approx(variation(to_uint8(z[0])))
    assert rows[2]["variation"] == pytest.approx(np.mean(expected))


def test_variation_is_the_standard_deviation_over_pictures() -> None:
    pictures = np.zeros((2, 4, 4, 3), np.uint8)
    assert variation(pictures) == 0
    pictures[1, :2] = 100
    assert variation(pictures) == 25  # half the pixels, 50 each


def cells(sheet: Path, row: int, columns: int, size: int = 96) -> list[np.ndarray]:
    """The pictures of a row of a sheet, from the right edge."""
    pixels = np.asarray(Image.open(sheet))[4 + (size + 4) * row :][:size]
    width = pixels.shape[1]
    starts = [width - (size + 4) * (columns - column) for column in range(columns)]
    return [pixels[:, start : start + size] for start in starts]


def run(tmp_path: Path, *options: str) -> list[dict[str, object]]:
    result = CliRunner().invoke(main, ["hierarchy", "--columns", "4", "--out", "h.png", *options])
    assert result.exit_code == 0, result.output
    return read_json(tmp_path / "h.json")["rows"]


@pytest.fixture
def here(trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    trained(sampling={"steps": 2})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_like_a_row_shows_it_and_freezes_to_it(here: Path) -> None:
    rows = run(here, "--like", "9")
    assert [(row["frozen"], row["row"]) for row in rows] == [([2], 9), ([1, 2], 9)]
    real = to_uint8(torch.from_numpy(open_hierarchy(load_recipe())[0].load()[[9], 0].astype("f4")).permute(0, 3, 1, 2))
    for row in range(2):
        first = cells(here / "h.png", row, 5)[0]
        np.testing.assert_array_equal(first[::12, ::12], real[0])
    assert [row["frozen"] for row in run(here, "--like", "9", "--freeze-from", "1")] == [[1, 2]]


def test_freezing_from_one_level_shows_several_samples(here: Path) -> None:
    rows = run(here, "--freeze-from", "2")
    assert [row.get("image") for row in rows] == [None, 0, 1, 2, 3]
    free = cells(here / "h.png", 0, 5)  # the first row has no fifth picture
    for image in range(4):
        frozen = cells(here / "h.png", image + 1, 5)
        np.testing.assert_array_equal(frozen[0], free[image])
        np.testing.assert_allclose(frozen[1 + image], free[image], atol=1)  # its own noise, its own levels


def test_an_interpolation_begins_and_ends_at_the_rows(here: Path) -> None:
    rows = run(here, "--interpolate", "3", "17", "--columns", "5")
    assert [(row["frozen"], row["rows"]) for row in rows] == [([2], [3, 17]), ([1, 2], [3, 17])]
    for row in range(2):
        start = cells(here / "h.png", row, 7)
        run(here, "--like", "3", "--columns", "2")
        like = cells(here / "h.png", row, 3)
        np.testing.assert_array_equal(start[0], like[0])  # the real picture
        np.testing.assert_allclose(start[1], like[1], atol=1)  # image 0 with its levels
        run(here, "--interpolate", "3", "17", "--columns", "5")


def test_depths_stand_under_each_other(here: Path) -> None:
    rows = run(here, "--over-depth")
    assert [row["depth"] for row in rows] == [1, 2, 3]
    samplers = load_samplers(load_recipe().depth(2), torch.device("cpu"))
    z = sample_images(samplers, range(4), ImageConditions(0))
    np.testing.assert_array_equal(cells(here / "h.png", 1, 4)[2][::12, ::12], to_uint8(z[0])[2])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--freeze-from", "3"), "--freeze-from 3 is not within 1..2"),
        (("--like", "40"), "has rows 0 to 39, not row 40"),
        (("--interpolate", "3", "40"), "has rows 0 to 39, not row 40"),
        (("--like", "3", "--depth", "1", "--freeze-from", "1"), "a hierarchy of one level has none to freeze"),
    ],
)
def test_what_cannot_be_looked_at_is_one_sentence(here: Path, options: tuple[str, ...], sentence: str) -> None:
    result = CliRunner().invoke(main, ["hierarchy", *options])
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert sentence in result.output


@given(seed=st.integers(0, 2**31), share=st.floats(0, 1))
def test_slerp_is_a_great_circle(seed: int, share: float) -> None:
    a, b = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b, rtol=1e-4, atol=1e-5)
    found = slerp(a, b, share)
    assert float(found.norm()) == pytest.approx(float(torch.lerp(a.norm(), b.norm(), share)), rel=1e-4)
    torch.testing.assert_close(slerp(a, a, share), a)


@given(seed=st.integers(0, 2**31))
def test_opposite_latents_have_a_way_too(seed: int) -> None:
    a = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(seed))
    assert slerp(a, -a, 0.5).isfinite().all()
