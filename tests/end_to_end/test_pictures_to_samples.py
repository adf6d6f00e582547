"""The whole path by its two command lines: pictures in, nested samples out.

A command starts as a user types it the first time, and later as a process that has its imports already.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Run = Callable[..., str]
BIN = Path(sys.executable).parent
TRAINING = {"steps": 12, "batch": 16, "lr": 1e-3, "warmup": 2, "checkpoint_every": 6, "preview": 8}


def typed(folder: Path, *arguments: object) -> str:
    """What the command printed. One thread, so that tests side by side don't fight for cores."""
    command = [str(BIN / str(arguments[0])), *map(str, arguments[1:])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return checked(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def run(begin: Callable) -> Run:
    """Like `typed`, without the seconds of a start."""
    return lambda folder, *arguments: checked(*begin(folder, *arguments).ended())


def checked(code: int, out: str, err: str) -> str:
    """What a command printed that ended well."""
    assert code == 0, err[-2000:]
    assert "Traceback" not in err
    return out


def write_recipe(folder: Path, features: dict, levels: list[dict]) -> None:
    recipe = {
        "name": "small",
        "features": features | {"out": "stores/train"},
        "levels": levels,
        "denoiser": {"size": "nano"},
        "training": TRAINING,
        "sampling": {"steps": 4},
    }
    (folder / "nested.yaml").write_text(json.dumps(recipe))


def check_pictures(folder: Path, count: int, side: int) -> None:
    paths = sorted(folder.glob("[0-9]*.png"))
    assert [path.name for path in paths] == [f"{index:06d}.png" for index in range(count)]
    for path in paths:
        with Image.open(path) as image:
            assert image.size == (side, side)
            assert np.asarray(image).std() > 1


def test_scenes_to_scored_samples(tmp_path: Path, run: Run) -> None:
    features = {"source": "scenes:16", "encoder": "tiny", "z0": "pixels:16", "limit": 64, "views": 2}
    levels = [{"shape": "16x16x3", "patch": 4}, {"shape": "4x4x8", "sigma": 0.5}, {"shape": "2x2x8", "sigma": 0.5}]
    write_recipe(tmp_path, features, levels)
    assert "64 rows from scenes" in typed(tmp_path, "featurize", "extract", "--workers", 0)
    run(tmp_path, "featurize", "levels", "1x1x16", "--workers", 0)
    typed(tmp_path, "nestgen", "train", "--level", 2)
    for level in (1, 0):
        run(tmp_path, "nestgen", "train", "--level", level)
    typed(tmp_path, "nestgen", "sample", "--count", 20, "--seed", 3, "--batch-size", 8, "--out", "samples")
    check_pictures(tmp_path / "samples", 20, 16)
    run(tmp_path, "featurize", "extract", "folder:samples", "--basis", "stores/train", "--levels", "1x1x16",
        "--out", "stores/samples", "--workers", 0)  # fmt: skip
    printed = typed(tmp_path, "nestgen", "evaluate", "--samples", "samples", "--samples-store", "stores/samples",
                    "--level-shape", "1x1x16")  # fmt: skip
    assert "FID" not in printed
    scores = json.loads((tmp_path / "samples" / "evaluation.json").read_text())["scores"]
    assert [score["space"] for score in scores] == ["z_2", "z_1", "z_0", "tiny 1x1x16"]
    assert all(score["frechet_distance"] > 0 for score in scores)


@pytest.fixture(scope="module")
def photos(run: Run, real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which real photos are extracted through a real small encoder."""
    folder = tmp_path_factory.mktemp("photos")
    features = {
        "source": f"wds:{real_data}/imagenette64/train-{{000000..000003}}.tar",
        "encoder": "timm:vit_tiny_patch16_224",
        "weights": str(real_data / "weights" / "vit_tin.safetensors"),
        "z0": "pixels:64",
        "limit": 600,
    }
    write_recipe(folder, features, [{"shape": "64x64x3", "patch": 4}, {"shape": "4x4x16", "sigma": 0.5}])
    run(folder, "featurize", "extract", "--workers", 2)
    return folder


def test_neighbours_of_real_photos_are_semantic(photos: Path, run: Run) -> None:
    printed = run(photos, "featurize", "knn-viz", "--out", "knn.png")
    agreement = json.loads((photos / "knn.json").read_text())["label_agreement"]
    assert "raw pixels" in printed
    assert agreement["mean of 8x8"] > agreement["raw pixels"] + 0.05
    assert agreement["4x4x16"] > agreement["raw pixels"] + 0.05


def test_a_two_level_model_of_real_photos_is_trained_sampled_and_scored(photos: Path, run: Run) -> None:
    for level in (1, 0):
        run(photos, "nestgen", "train", "--level", level, "--steps", 4)
    run(photos, "nestgen", "sample", "--count", 6, "--out", "samples")
    check_pictures(photos / "samples", 6, 64)
    assert "z_1" in run(photos, "nestgen", "evaluate", "--samples", "samples")


def test_coco_with_captions(real_data: Path, tmp_path: Path, run: Run) -> None:
    features = {
        "source": f"coco:{real_data}/coco",
        "encoder": "timm:vit_tiny_patch16_224",
        "weights": str(real_data / "weights" / "vit_tin.safetensors"),
        "split": "val",
        "basis": "own",  # the small copy has no other split
        "limit": 40,
    }
    write_recipe(tmp_path, features, [{"shape": "32x32x3", "patch": 4}, {"shape": "2x2x8"}])
    assert "captions" in run(tmp_path, "featurize", "extract", "--workers", 0)
    run(tmp_path, "featurize", "knn-viz", "--out", "knn.png")
    assert (tmp_path / "knn.png").stat().st_size > 10_000
