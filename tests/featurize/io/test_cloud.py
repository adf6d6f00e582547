"""A store root in a bucket: the same bytes as on a disk."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

from featurize.errors import UserError
from featurize.extraction.extract import extract
from featurize.io.files import resolve_path
from featurize.recipe import read_request
from tests.featurize.conftest import MODEL, as_words, chunks, options


def objects(root: Path) -> dict[str, bytes]:
    """Every chunk and seal below an address."""
    found = root.fs.find(root.path)  # type: ignore[attr-defined]
    names = {name.partition(f"{root.path}/")[2]: name for name in found}
    return {
        name: root.fs.cat_file(path)  # type: ignore[attr-defined]
        for name, path in names.items()
        if "/c/" in name or name.endswith(".seal.json")
    }


def test_a_bucket_gets_the_bytes_of_a_disk(
    bucket: str, extraction: Path, picture_folder: Path, vit_weights: Path, featurize: Callable
) -> None:
    out = f"{bucket}/stores/train"
    request = read_request(None, options(picture_folder, vit_weights, out), "2x2x8,1x1x16")
    # One process seals what two others wrote; apart, as the tests' own workers may be older than the bucket's variables.
    words = [*as_words(options(picture_folder, vit_weights, out)), "--workers", 2]
    command = [sys.executable, "-m", "featurize", "extract", request.features.source, *words]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    root = resolve_path(out)
    assert objects(root) == chunks(extraction)
    assert not [name for name in root.fs.find(root.path) if ".blocks" in name or name.endswith(".lock")]  # type: ignore[attr-defined]
    z_0 = zarr.open(f"{out}/pixels/16x16x3.zarr", mode="r")
    np.testing.assert_array_equal(z_0[:5], zarr.open(str(extraction / "pixels" / "16x16x3.zarr"), mode="r")[:5])

    # Asked again, nothing is written; damage is found and mended; a level is derived; all is listed.
    before = {name: info["LastModified"] for name, info in root.fs.find(root.path, detail=True).items()}  # type: ignore[attr-defined]
    extract(request, workers=0, scheduler=None)
    root.fs.invalidate_cache()  # type: ignore[attr-defined]
    assert {name: info["LastModified"] for name, info in root.fs.find(root.path, detail=True).items()} == before  # type: ignore[attr-defined]
    (root / "pixels" / "16x16x3.zarr" / "c" / "1" / "0" / "0" / "0" / "0").write_bytes(b"short")
    found = featurize("verify", out)
    assert (found.code, "block 1: has 5 bytes" in found.out) == (1, True), found.out + found.err
    assert featurize("repair", out).code == 0
    assert objects(root) == chunks(extraction)
    derived = featurize("levels", "3x3x4", "--out", out, "--encoder", f"timm:{MODEL}")
    assert derived.code == 0, derived.err
    assert "3x3x4.zarr" in featurize("ls", f"{bucket}/stores").out


def test_another_split_takes_the_basis_of_a_bucket(
    bucket: str, picture_folder: Path, vit_weights: Path, tmp_path: Path
) -> None:
    train = f"{bucket}/train"
    extract(read_request(None, options(picture_folder, vit_weights, train), "1x1x4"), workers=0, scheduler=None)
    request = read_request(None, options(picture_folder, vit_weights, tmp_path / "val", basis=train), "1x1x4")
    extract(request, workers=0, scheduler=None)
    first = np.asarray(zarr.open(f"{train}/timm-{MODEL}/1x1x4.zarr", mode="r")[:])
    np.testing.assert_array_equal(first, zarr.open(str(tmp_path / "val" / f"timm-{MODEL}" / "1x1x4.zarr"), mode="r")[:])


def test_an_unknown_protocol_is_one_sentence() -> None:
    with pytest.raises(UserError, match="can't be reached"):
        resolve_path("nowhere://bucket/root")
