"""Damage is found, named, and mended into the very bytes that were there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

from .conftest import MODEL
from .test_extract import chunks

ENCODER = f"timm-{MODEL}"
BASE, LEVEL, Z0 = f"{ENCODER}/base", f"{ENCODER}/2x2x8", "pixels/16x16x3"


@pytest.fixture
def root(extraction: Path, tmp_path: Path) -> Path:
    return shutil.copytree(extraction, tmp_path / "root")


def chunk(root: Path, array: str, block: int) -> Path:
    first = root / f"{array}.zarr" / "c" / str(block)
    return first if array == "labels" else first / "0/0/0/0"


def flip(root: Path, array: str) -> None:
    path = chunk(root, array, 1)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(bytes(data))


def truncate(root: Path, array: str) -> None:
    path = chunk(root, array, 1)
    path.write_bytes(path.read_bytes()[:-7])


def remove(root: Path, array: str) -> None:
    chunk(root, array, 1).unlink()


def unseal(root: Path, array: str) -> None:
    (root / f"{array}.seal.json").unlink()


def record_without_data(root: Path, array: str) -> None:
    """An array that was never sealed, one of whose records has no chunk."""
    seal = root / f"{array}.seal.json"
    folder = root / f"{array}.blocks"
    folder.mkdir()
    for block, record in enumerate(json.loads(seal.read_text())["blocks"]):
        (folder / f"{block:06d}.json").write_text(json.dumps(record))
    seal.unlink()
    chunk(root, array, 1).unlink()


@pytest.mark.parametrize("array", [BASE, LEVEL, Z0])
@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (flip, "block 1: has other bytes than were written"),
        (truncate, "block 1: has"),
        (remove, "block 1: has no chunk"),
        (unseal, "has neither a seal nor records"),
        (record_without_data, "block 1: has no chunk"),
    ],
)
def test_damage_is_found_and_mended(
    damage: Callable, problem: str, array: str, root: Path, extraction: Path, featurize: Callable
) -> None:
    damage(root, array)
    found = featurize("verify", root)
    assert found.code == 1
    assert any(f"{array}.zarr" in line and problem in line for line in found.out.splitlines()), found.out
    assert all(f"{array}.zarr" in line for line in found.out.splitlines()), found.out
    mended = featurize("repair", root)
    assert mended.code == 0, mended.out + mended.err
    assert chunks(root) == chunks(extraction)
    assert featurize("verify", root).code == 0


def test_labels_come_from_the_ledger(root: Path, extraction: Path, featurize: Callable) -> None:
    flip(root, "labels")
    assert "labels.zarr, block 1: has other bytes" in featurize("verify", root).out
    assert featurize("repair", root).code == 0
    assert chunks(root) == chunks(extraction)


def test_a_whole_store_is_left_as_it_is(root: Path, featurize: Callable) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    assert "is whole: 5 arrays" in featurize("verify", root, "--re-encode", 7).out
    assert featurize("repair", root).code == 0
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()} == before


def rewrite(root: Path, array: str, change: Callable[[np.ndarray], None]) -> None:
    """Change values together with the seal, as a wrong program would: the digests agree, the values are wrong."""
    import hashlib

    path = chunk(root, array, 0)
    store = zarr.open(str(root / f"{array}.zarr"), mode="r")
    values = np.fromfile(path, store.dtype).reshape(store.chunks)
    change(values)
    path.write_bytes(values.tobytes())
    seal = root / f"{array}.seal.json"
    document = json.loads(seal.read_text())
    document["blocks"][0]["sha256"] = hashlib.sha256(values.tobytes()).hexdigest()
    digests = "".join(block["sha256"] for block in document["blocks"])
    document["sha256"] = hashlib.sha256(digests.encode()).hexdigest()
    seal.write_text(json.dumps(document))


def test_values_that_no_digest_betrays_are_found(root: Path, featurize: Callable) -> None:
    def constant(values: np.ndarray) -> None:
        values[3] = 0.5

    def missing(values: np.ndarray) -> None:
        values[2, 0, 0, 0, 0] = np.nan

    def swapped(values: np.ndarray) -> None:
        values[[4, 5]] = values[[5, 4]]

    rewrite(root, BASE, constant)
    rewrite(root, Z0, missing)
    rewrite(root, f"{ENCODER}/1x1x16", swapped)
    lines = featurize("verify", root).out.splitlines()
    assert any("base.zarr, block 0: 1 rows, the first 3, are constant" in line for line in lines)
    assert any("16x16x3.zarr, block 0: 1 rows, the first 2, hold NaN" in line for line in lines)


def test_a_level_of_other_rows_and_other_statistics_are_found(root: Path, featurize: Callable) -> None:
    def swapped(values: np.ndarray) -> None:
        values[[4, 5]] = values[[5, 4]]

    rewrite(root, LEVEL, swapped)
    metadata = root / f"{ENCODER}/1x1x16.zarr" / "zarr.json"
    document = json.loads(metadata.read_text())
    document["attributes"]["std"][0] *= 1.01
    metadata.write_text(json.dumps(document))
    lines = featurize("verify", root).out.splitlines()
    assert any("2x2x8.zarr, block 0: 2 rows, the first 4, are not the base store's" in line for line in lines), lines
    assert any("1x1x16.zarr" in line for line in lines)


def test_rows_of_other_pictures_are_found_by_encoding_again(root: Path, featurize: Callable) -> None:
    def swapped(values: np.ndarray) -> None:
        values[:] = values[::-1].copy()

    rewrite(root, BASE, swapped)
    rewrite(root, Z0, swapped)
    assert "encoded again" not in featurize("verify", root).out
    again = featurize("verify", root, "--re-encode", 60)
    assert again.code == 1
    for array in (BASE, Z0):
        assert f"{array}.zarr, block 0: row " in again.out.replace(str(root) + "/", "")


def test_the_ledger_and_the_headers_are_checked(root: Path, featurize: Callable) -> None:
    metadata = root / "labels.zarr" / "zarr.json"
    document = json.loads(metadata.read_text())
    document["attributes"]["keys_sha256"] = "0" * 64
    metadata.write_text(json.dumps(document))
    assert "its rows are other pictures" in featurize("verify", root).out
    (root / "rows.parquet").write_bytes(b"PAR1 no")
    found = featurize("verify", root)
    assert (found.code, "damaged" in found.out) == (1, True)


def test_no_store_root_is_one_sentence(tmp_path: Path, featurize: Callable) -> None:
    for command in ("verify", "repair", "ls"):
        outcome = featurize(command, tmp_path)
        assert outcome.code == 1
        assert "no store root" in outcome.err
        assert not list(tmp_path.iterdir())


def test_ls_shows_every_root_and_array(extraction: Path, featurize: Callable) -> None:
    outcome = featurize("ls", extraction.parent)
    assert "60 rows of folder:" in outcome.out
    for name in ("labels.zarr", f"{BASE}.zarr", f"{LEVEL}.zarr", f"{Z0}.zarr"):
        assert any(name in line and "sealed" in line for line in outcome.out.splitlines())
    assert f"timm:{MODEL} " in outcome.out
