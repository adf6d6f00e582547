"""What commit 135b89d wrote goes on working: its stores, checkpoints and samples (tests/fixtures/make_previous.py)."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.end_to_end.test_pictures_to_samples import Run, checked

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "previous.tar.xz"
# The archive's z_0 names its VAE's file where commit 135b89d lay, which is nowhere now.
VAE = Path(str(files("featurize"))) / "weights" / "tiny_vae" / "diffusion_pytorch_model.safetensors"
NARROW = "from nestgen.denoiser.config import SIZES; SIZES['nano'] = (8, 2, 2)"


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """The archive's folder: nested.yaml, stores, runs, samples."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.fixture
def run(begin: Callable, experiment: Path) -> Run:
    """Runs a command in the experiment's folder and returns what it printed."""
    return lambda *arguments: checked(*begin(experiment, *arguments, before=NARROW).ended())


def contents(root: Path) -> dict[str, bytes]:
    """Every file below a folder but the log."""
    files = (path for path in root.rglob("*") if path.is_file() and path.suffix != ".jsonl")
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def test_stores_are_whole_and_asking_again_does_nothing(experiment: Path, run: Run) -> None:
    root = experiment / "stores" / "train"
    before = contents(root)
    assert "2x2x8" in run("featurize", "info", root)
    run("featurize", "verify", root)
    run("featurize", "extract", "--workers", 0)
    assert contents(root) == before


def test_a_level_is_derived_from_its_base_store(experiment: Path, run: Run) -> None:
    run("featurize", "levels", "1x1x8", "--workers", 0)
    assert (experiment / "stores" / "train" / "tiny" / "1x1x8.seal.json").is_file()
    run("featurize", "verify", experiment / "stores" / "train")


def test_a_lost_block_is_repaired_to_the_same_bytes(experiment: Path, run: Run) -> None:
    root = experiment / "stores" / "train"
    chunk = next(path for path in (root / "vae" / "8x8x8.zarr" / "c").rglob("*") if path.is_file())
    whole = np.frombuffer(chunk.read_bytes(), "<f2")
    chunk.write_bytes(bytes(whole.nbytes))
    run("featurize", "repair", root)
    repaired = np.frombuffer(chunk.read_bytes(), "<f2")
    # Other processors round otherwise. The rows of a block that the store does not have are NaN in both.
    np.testing.assert_allclose(repaired.astype(float), whole.astype(float), rtol=0, atol=0.01)
    run("featurize", "verify", root)


def test_training_goes_on_from_its_checkpoint(experiment: Path, run: Run) -> None:
    recipe = experiment / "nested.yaml"
    recipe.write_text(recipe.read_text().replace("steps: 4\n  warmup", "steps: 6\n  warmup"))
    assert "steps: 6" in recipe.read_text()
    run("nestgen", "train", "--level", 0)
    folder = experiment / "runs" / "previous" / "z0-given-z1-sigma0.5"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["00000006"]
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert steps[-1] == 6
    assert len(set(steps)) == len(steps)


def test_its_denoisers_draw_the_same_samples(experiment: Path, run: Run) -> None:
    old = contents(experiment / "samples")
    run("nestgen", "sample", "--count", 2, "--out", "samples", "--vae", VAE)
    new = contents(experiment / "samples")
    assert {name for name in old if old[name] != new.get(name)} <= {"sample.json"}  # it now names its blocks' size
    run("nestgen", "sample", "--count", 2, "--out", "again", "--vae", VAE)
    for name in ("000000.png", "000001.png"):
        one, other = (np.asarray(Image.open(experiment / folder / name), int) for folder in ("samples", "again"))
        assert np.abs(one - other).max() <= 2  # other processors round otherwise


def test_its_samples_are_scored(experiment: Path, run: Run) -> None:
    assert "z_0" in run("nestgen", "evaluate", "--samples", "samples", "--reference", "stores/train")
