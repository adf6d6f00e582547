"""The workflow started again: as it was, killed, with another σ, with another level."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.conftest import PIPELINES, Snakemake

SMALL: dict[str, Any] = {
    "name": "small",
    "features": {"source": "scenes:16", "out": "stores/train", "encoder": "tiny", "z0": "pixels:16", "limit": 24},
    "levels": [{"shape": "16x16x3", "patch": 4}, {"shape": "2x2x8", "sigma": 0.5}],
    "denoiser": {"size": "nano"},
    "training": {"steps": 6, "batch": 8, "warmup": 2, "checkpoint_every": 3, "preview": 0},
    "sampling": {"steps": 2, "batch": 12},
    "evaluation": {"count": 12, "reference": "stores/val"},
    "grid": {"depths": [1, 2], "sigmas": [0, 1]},
}
WHOLE = ("samples/L1/evaluation.json", "samples/L2-sigma0/evaluation.json")
# Snakemake in a process of its own, whose commands are the served ones.
APART = "import sys; sys.executable = sys.argv.pop(1); from snakemake.cli import main; sys.exit(main())"


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "small.yaml"
    path.write_text(json.dumps(SMALL | changes))
    return path


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file of a folder."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def finished(served_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small experiment: two hierarchies from pictures to scores, by Snakemake in a process of its own."""
    folder = tmp_path_factory.mktemp("experiment")
    done = subprocess.run(*apart(folder, served_bin, *WHOLE), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def apart(folder: Path, served_bin: Path, *targets: str) -> tuple[list[str]]:
    words = ["--snakefile", PIPELINES / "Snakefile", "--directory", folder, "--cores", "2", "--rerun-incomplete"]
    words += [*targets, "--config", f"recipe={write(folder)}"]
    return ([sys.executable, "-c", APART, str(served_bin / "python"), *map(str, words)],)


def test_nothing_is_done_twice(finished: Path, served: None, snakemake: Snakemake) -> None:
    assert not snakemake(finished / "small.yaml", finished, *WHOLE, dry=True).jobs


def test_killed_and_started_again_it_ends_in_the_same(
    finished: Path, served_bin: Path, served: None, snakemake: Snakemake, tmp_path: Path
) -> None:
    """Killed in a training, with Snakemake's lock left behind, from the stores on."""
    target = "samples/L1/evaluation.json"
    shutil.copytree(finished / "stores/train", tmp_path / "stores/train")
    begun = subprocess.Popen(
        *apart(tmp_path, served_bin, target),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not list(tmp_path.glob("runs/small/z0-top/checkpoints/*")):
        assert begun.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    os.killpg(begun.pid, signal.SIGKILL)
    for command in multiprocessing.active_children():
        command.kill()
    begun.wait()
    assert not (tmp_path / target).exists()
    assert list(tmp_path.glob(".snakemake/locks/*")), "Snakemake holds no lock, so this tests nothing"

    snakemake(tmp_path / "small.yaml", tmp_path, target)
    assert json.loads((tmp_path / target).read_text()) == json.loads((finished / target).read_text())
    for picture in (finished / "samples/L1").glob("[0-9]*.png"):
        assert (tmp_path / "samples/L1" / picture.name).read_bytes() == picture.read_bytes()


def test_another_sigma_trains_what_depends_on_it(finished: Path, served: None, snakemake: Snakemake) -> None:
    recipe = write(finished, grid={"depths": [1, 2], "sigmas": [0, 0.5]})
    found = snakemake(recipe, finished, *WHOLE, "samples/L2-sigma0.5/evaluation.json", dry=True)
    write(finished)
    assert dict(found.jobs) == {"train": 1, "sample": 1, "encode_samples": 1, "evaluate": 1}
    assert "--level 0 --depth 2 --sigma 0.5" in found.shell["train"][0]


@pytest.mark.parametrize(
    ("changes", "runs"),
    [
        ({"seed": 5}, {"train": 3, "sample": 2, "evaluate": 2}),
        ({"levels": [{"shape": "16x16x3", "patch": 2}, SMALL["levels"][1]]}, {"train": 2, "sample": 2, "evaluate": 2}),
        ({"levels": [SMALL["levels"][0], {"shape": "2x2x8", "sigma": 0.5, "size": "mini"}]}, {"train": 2, "sample": 1}),
        ({"sampling": {"steps": 3, "batch": 12}}, {"sample": 2, "evaluate": 2}),
    ],
    ids=["seed", "patch of z_0", "size of z_1", "sampling"],
)
def test_what_a_change_of_the_recipe_concerns_is_planned_again(
    finished: Path, served: None, snakemake: Snakemake, changes: dict[str, Any], runs: dict[str, int]
) -> None:
    found = snakemake(write(finished, **changes), finished, *WHOLE, dry=True)
    write(finished)
    assert runs.items() <= found.jobs.items()


def test_other_features_are_extracted_and_trained_on_in_one_run(
    finished: Path, served: None, snakemake: Snakemake, tmp_path: Path
) -> None:
    root, target = tmp_path / "experiment", "samples/L1/evaluation.json"
    shutil.copytree(finished, root)
    recipe = write(root, features={**SMALL["features"], "encoder": "pixels"})
    done = snakemake(recipe, root, target)
    assert {"extract": 1, "train": 1, "sample": 1, "evaluate": 1}.items() <= done.jobs.items()
    assert not snakemake(recipe, root, target, dry=True).jobs


def test_another_level_is_derived_and_nothing_encoded(
    finished: Path, served: None, snakemake: Snakemake, tmp_path: Path
) -> None:
    root = tmp_path / "experiment"
    shutil.copytree(finished, root)
    before = state_of(root / "stores/train")
    recipe = write(root, levels=[*SMALL["levels"], {"shape": "1x1x8"}], grid={"depths": [1, 2, 3], "sigmas": [0, 1]})
    planned = snakemake(recipe, root, *WHOLE, "samples/L3-sigma1/sample.json", dry=True)
    assert planned.jobs["train"] == 3  # z_0 given z_1 at σ = 1, which L = 3 may choose; z_1 given z_2; z_2's own
    assert planned.jobs["extract"] == planned.jobs["extract_reference"] == 1
    assert planned.jobs["sample"] == 2  # L2-sigma1, by which σ is chosen, and L3-sigma1
    assert planned.jobs["evaluate"] == 1  # and none of those that were there
    snakemake(recipe, root, "stores/train/tiny/1x1x8.seal.json")
    after = state_of(root / "stores/train")
    chunks = [name for name in before if ".zarr/c/" in name]
    assert chunks and all(after[name] == before[name] for name in chunks)
    assert (root / "stores/train/tiny/1x1x8.zarr").is_dir()
