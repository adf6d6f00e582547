"""Levels are pooled, cut and standardised from the base store, by the training split's numbers for another split."""

from __future__ import annotations

import shlex
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from featurize.encoders import registry
from featurize.extraction import levels
from featurize.extraction.extract import extract
from featurize.io.lock import root_lock
from featurize.recipe import read_request
from tests.featurize.conftest import MODEL, options

ENCODER = f"timm-{MODEL}"


def test_a_level_is_the_standardised_pooled_base(extraction: Path) -> None:
    base = np.asarray(zarr.open(str(extraction / ENCODER / "base.zarr"), mode="r")[:]).astype(np.float64)
    level = zarr.open(str(extraction / ENCODER / "2x2x8.zarr"), mode="r")
    n, views = base.shape[:2]
    maps = torch.from_numpy(base.reshape(n * views, *base.shape[2:])[..., :8]).permute(0, 3, 1, 2)
    pooled = torch.nn.functional.adaptive_avg_pool2d(maps, (2, 2)).permute(0, 2, 3, 1).numpy()
    mean, std = pooled.mean(axis=(0, 1, 2)), pooled.std(axis=(0, 1, 2))
    np.testing.assert_allclose(level.attrs["mean"], mean, atol=1e-6)
    np.testing.assert_allclose(level.attrs["std"], std, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(level[:]).reshape(pooled.shape), (pooled - mean) / std, atol=4e-3)


def test_a_further_level_needs_no_encoder(
    extraction: Path, tmp_path: Path, featurize: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(extraction, tmp_path / "root")
    registry._load_identified.cache_clear()
    monkeypatch.setattr("featurize.encoders.registry.kinds", None)
    outcome = featurize("levels", "3x3x4", "--out", root, "--encoder", f"timm:{MODEL}")
    assert outcome.code == 0, outcome.err
    assert zarr.open(str(root / ENCODER / "3x3x4.zarr"), mode="r").shape == (60, 2, 3, 3, 4)


def test_levels_wait_for_the_run_that_writes_the_base_store(
    extraction: Path,
    tmp_path: Path,
    featurize: Callable,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("featurize.io.lock.POLL", 0.01)
    root = shutil.copytree(extraction, tmp_path / "root")
    seal = root / ENCODER / "base.seal.json"
    unsealed = seal.rename(tmp_path / "seal")
    held, over = threading.Event(), threading.Event()

    def seal_it() -> None:
        with root_lock(root, wait=False):
            held.set()
            while not (over.is_set() or "waiting for it to end" in caplog.text):
                time.sleep(0.01)
            unsealed.rename(seal)

    with ThreadPoolExecutor(1) as thread:
        other = thread.submit(seal_it)
        held.wait()
        outcome = featurize("levels", "3x3x4", "--out", root, "--encoder", f"timm:{MODEL}", "--wait")
        over.set()
        other.result()
    assert outcome.code == 0, outcome.err
    nowhere = featurize("levels", "3x3x4", "--out", tmp_path / "nowhere")
    assert f"no store at {tmp_path / 'nowhere'}" in nowhere.err and not (tmp_path / "nowhere").exists()


def test_the_base_store_is_read_once_for_all_levels(
    extraction: Path, picture_folder: Path, vit_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the reading back that its seal needs, which the sums come from; beside a sealed one there are two readings."""
    read: list[int] = []
    read_block = levels.read_block
    monkeypatch.setattr(levels, "read_block", lambda array, block: read.append(block) or read_block(array, block))
    request = options(picture_folder, vit_weights, tmp_path)
    extract(read_request(None, request, "2x2x8,1x1x16,4x4x8"), workers=0, scheduler=None)
    blocks = list(range(len(read)))
    assert len(blocks) > 1 and read == blocks
    for shape in ("2x2x8", "1x1x16"):
        for name in (f"{shape}.seal.json", f"{shape}.zarr/zarr.json"):
            assert (tmp_path / ENCODER / name).read_bytes() == (extraction / ENCODER / name).read_bytes()
    extract(read_request(None, request, "3x3x8,2x2x4,2x2x8"), workers=0, scheduler=None)
    assert read == blocks * 3


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ("5x5x4", "larger than the 4x4 grid"),
        ("2x2x900", "keeps 48"),
        ("2x2", "'2x2' can't be a level's shape"),
        ("0x2x4", "'0x2x4' can't be a level's shape"),
    ],
)
def test_an_impossible_level_is_one_sentence(extraction: Path, featurize: Callable, shape: str, sentence: str) -> None:
    outcome = featurize("levels", shape, "--out", extraction, "--encoder", f"timm:{MODEL}")
    assert outcome.code == 1
    assert sentence in outcome.err
    assert not (extraction / ENCODER / f"{shape}.zarr").exists()


def test_a_level_where_z_0_is_is_one_sentence(tmp_path: Path, featurize: Callable) -> None:
    """An encoder and a codec of one name share a folder."""
    command = ("extract", "scenes:16", "--limit", 8, "--encoder", "pixels", "--z0", "pixels:2", "--out", tmp_path)
    outcome = featurize(*command, "--levels", "2x2x3", "--workers", 0)
    assert outcome.code == 1 and "The level 2x2x3 and z_0 would both be pixels/2x2x3.zarr" in outcome.err
    assert not list(tmp_path.rglob("*.zarr"))
    assert featurize(*command, "--levels", "1x1x3", "--workers", 0).code == 0
    outcome = featurize("levels", "2x2x3", "--encoder", "pixels", "--out", tmp_path)
    assert outcome.code == 1 and "The level 2x2x3 would be where z_0 is" in outcome.err


def test_another_split_takes_basis_and_standardisation(
    extraction: Path, picture_folder: Path, vit_weights: Path, tmp_path: Path, featurize: Callable
) -> None:
    held_out = picture_folder / "class-1"
    request = options(held_out, vit_weights, tmp_path / "val", basis=str(extraction))
    extract(read_request(None, request, "2x2x8"), workers=0, scheduler=None)
    train = zarr.open(str(extraction / ENCODER / "2x2x8.zarr"), mode="r")
    val = zarr.open(str(tmp_path / "val" / ENCODER / "2x2x8.zarr"), mode="r")
    for attribute in ("mean", "std", "basis_sha256"):
        assert val.attrs[attribute] == train.attrs[attribute]
    # The same picture has the same latent in both: class-1's are rows 20 to 39 of the training split.
    np.testing.assert_array_equal(np.asarray(val[:]), np.asarray(train[20:40]))

    root = shutil.copytree(extraction, tmp_path / "its train")
    outcome = featurize("levels", "1x1x4", "--out", tmp_path / "val", "--encoder", f"timm:{MODEL}")
    assert outcome.code == 1
    assert "give --basis" in outcome.err
    outcome = featurize("levels", "1x1x4", "--out", tmp_path / "val", "--encoder", f"timm:{MODEL}", "--basis", root)
    # The advice works: it makes the level of the training split, and then the command above does what it was asked.
    _, _, advice = outcome.err.rpartition("make that level first: featurize ")
    assert featurize(*shlex.split(advice)).code == 0
    outcome = featurize("levels", "1x1x4", "--out", tmp_path / "val", "--encoder", f"timm:{MODEL}", "--basis", root)
    assert outcome.code == 0
