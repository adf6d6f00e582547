"""Stores, checkpoints and samples of earlier commits go on: they are opened, resumed and sampled.

toy/ of tests/fixtures/previous.tar.xz was made at commit 135b89d, which kept all modules in one folder: two toy levels
(4x4x3 pixels and 2x2x2), their denoisers of (D, depth, heads) = (4, 2, 1), told sigma, after 4 steps of seed 5, two
samples with guidance, and the averaged weights after 2 further steps of D_0. tests/end_to_end/test_previous_version.py takes
the rest of the archive, which the command lines of both packages wrote.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

from nestgen.cli.main import main
from nestgen.denoiser.config import SIZES
from nestgen.recipe.locations import run_dir
from nestgen.recipe.recipe import Recipe, load_recipe
from nestgen.runs.checkpoint import newest
from nestgen.stores.hierarchy import open_level

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "previous.tar.xz"
pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of that experiment."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, [one for one in archive if one.name.startswith("toy/")], filter="data")
    monkeypatch.setitem(SIZES, "nano", (4, 2, 1))
    monkeypatch.chdir(tmp_path / "toy")
    return tmp_path / "toy"


def run(*arguments: str) -> str:
    """What a command prints."""
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def average(recipe: Recipe) -> dict[str, torch.Tensor]:
    """The newest averaged weights of D_0."""
    checkpoint = newest(run_dir(recipe, 0))
    assert checkpoint is not None
    return checkpoint.load("ema")


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Euclidean distance between weights of the same names."""
    assert one.keys() == other.keys()
    return float(sum((one[name] - other[name]).double().square().sum() for name in one) ** 0.5)


def test_a_training_goes_on(earlier: Path) -> None:
    recipe = load_recipe()
    stores = open_level(recipe, 0)
    assert (stores.z.rows, stores.z.latent_shape, stores.above[0].latent_shape) == (12, (4, 4, 3), (2, 2, 2))
    first = average(recipe)
    assert "goes on from step 4" in run("train", "--level=0", "--steps=6")
    last, expected = average(recipe), load_file(earlier / "expected/ema-6.safetensors")
    assert distance(last, expected) < 1e-3 * distance(
        first, expected
    )  # the bytes, but for another processor's rounding


def test_a_sample_folder_goes_on(earlier: Path) -> None:
    images = [earlier / f"samples/00000{index}.png" for index in range(3)]
    before = [image.stat().st_mtime_ns for image in images[:2]]
    run("sample", "--count=3", "--out=samples")
    assert [image.stat().st_mtime_ns for image in images[:2]] == before
    assert images[2].is_file()


def test_it_samples_the_same(earlier: Path) -> None:
    run("sample", "--count=2", "--out=again")
    for index in range(2):
        name = f"00000{index}.png"
        again, before = (np.asarray(Image.open(earlier / folder / name), np.int64) for folder in ("again", "samples"))
        assert np.abs(again - before).max() <= 1  # another processor rounds otherwise
