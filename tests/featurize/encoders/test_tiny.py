"""The embedded encoder: what ships is what its JSON says, and it sees more in a scene than its pixels."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from featurize.scenes import CLASSES, draw_scene

WEIGHTS = Path(str(files("featurize") / "weights"))
SCRIPT = Path(__file__).parents[3] / "packages" / "featurize" / "training" / "train_tiny.py"


def load(folder: Path) -> tuple[torch.nn.Module, dict[str, Any]]:
    card = json.loads((folder / "tiny.json").read_text())
    model = timm.create_model(card["model"], **card["model_args"])
    model.load_state_dict(safetensors.torch.load_file(folder / "tiny.safetensors"), strict=True)
    return model.eval(), card


@pytest.fixture(scope="module")
def tiny() -> tuple[torch.nn.Module, dict[str, Any]]:
    return load(WEIGHTS)


def scenes(split: str, count: int, size: int) -> tuple[list[Image.Image], np.ndarray]:
    drawn = [draw_scene(0, split, index, size) for index in range(count)]
    return [scene.image for scene in drawn], np.array([scene.label for scene in drawn])


def mean_tokens(model: torch.nn.Module, card: dict[str, Any], images: list[Image.Image]) -> np.ndarray:
    """As the package does it: resized by Pillow's bicubic, not by torch as in training."""
    side = card["input_size"]
    resized = np.stack([np.asarray(i.resize((side, side), Image.Resampling.BICUBIC), np.float32) for i in images])
    x_BCHW = torch.from_numpy((resized / 255 - card["mean"]) / card["std"]).float().permute(0, 3, 1, 2)
    with torch.inference_mode():
        return torch.cat([model(part) for part in x_BCHW.split(100)]).numpy()


def knn_accuracy(rows: np.ndarray, labels: np.ndarray, queries: np.ndarray, wanted: np.ndarray) -> float:
    """20 nearest by cosine, majority vote."""
    rows, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rows, queries))
    nearest = np.argsort(-(queries @ rows.T), axis=1)[:, :20]
    votes = [np.bincount(labels[row], minlength=len(CLASSES)).argmax() for row in nearest]
    return float(np.mean(np.array(votes) == wanted))


def test_what_ships_is_small_and_stated(tiny: tuple[torch.nn.Module, dict[str, Any]]) -> None:
    _, card = tiny
    data = (WEIGHTS / "tiny.safetensors").read_bytes()
    assert len(data) <= 6 * 2**20
    assert card["sha256"] == hashlib.sha256(data).hexdigest()
    assert card["classes"] == list(CLASSES)
    assert {"recipe", "versions", "knn"} <= set(card)
    assert isinstance(card["recipe"]["seed"], int)
    assert all(value.dtype == torch.float16 for value in safetensors.torch.load(data).values())


def test_feature_grid(tiny: tuple[torch.nn.Module, dict[str, Any]]) -> None:
    """An 8 x 8 grid, the final norm on the tokens, their mean as the picture's feature."""
    model, card = tiny
    x_BCHW = torch.linspace(-1, 1, 2 * 3 * 64 * 64).reshape(2, 3, card["input_size"], card["input_size"])
    with torch.inference_mode():
        tokens_BTD = model.forward_features(x_BCHW)
        assert tokens_BTD.shape == (2, 64, card["model_args"]["embed_dim"])
        torch.testing.assert_close(model(x_BCHW), tokens_BTD.mean(1))
    normed = (tokens_BTD - model.norm.bias) / model.norm.weight
    torch.testing.assert_close(normed.mean(-1), torch.zeros(2, 64), atol=1e-3, rtol=0)
    torch.testing.assert_close(normed.std(-1, correction=0), torch.ones(2, 64), atol=1e-2, rtol=0)


@pytest.mark.parametrize("size", [32, 64])
def test_neighbours_beat_raw_pixels(tiny: tuple[torch.nn.Module, dict[str, Any]], size: int) -> None:
    """By 30 points at the least, with a tenth of the rows that docs/tiny.md measures with."""
    images, labels = scenes("train", 600, size)
    queries, wanted = scenes("val", 200, size)
    pixels, query_pixels = (
        np.stack([np.asarray(i, np.float32).ravel() for i in x]) / 127.5 - 1 for x in (images, queries)
    )
    by_pixels = knn_accuracy(pixels, labels, query_pixels, wanted)
    by_tiny = knn_accuracy(mean_tokens(*tiny, images), labels, mean_tokens(*tiny, queries), wanted)
    assert by_tiny >= by_pixels + 0.3, f"tiny {by_tiny:.3f}, raw pixels {by_pixels:.3f}"


def test_the_recipe_can_be_run(tmp_path: Path) -> None:
    """The training script still trains, measures and writes what the package loads."""
    sizes = {"--steps": 2, "--scenes": 32, "--rows": 48, "--queries": 12, "--threads": 1, "--out": tmp_path}
    command = [sys.executable, str(SCRIPT), *(str(word) for option in sizes.items() for word in option)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    _, card = load(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.json", "tiny.safetensors"]
    assert (card["knn"]["train_rows"], card["recipe"]["steps"]) == (48, 2)
