"""Damage is found, named, and repaired into the very bytes that were there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from safetensors.torch import load_file, save_file

from featurize.extraction.extract import extract
from featurize.io.files import json_sha256
from featurize.recipe import read_request
from tests.featurize.conftest import MODEL, as_words, chunks, options, random_picture

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
def test_damage_is_found_and_repaired(
    damage: Callable, problem: str, array: str, root: Path, extraction: Path, featurize: Callable
) -> None:
    damage(root, array)
    found = featurize("verify", root)
    assert found.code == 1
    assert any(f"{array}.zarr" in line and problem in line for line in found.out.splitlines()), found.out
    assert all(f"{array}.zarr" in line for line in found.out.splitlines()), found.out
    repaired = featurize("repair", root)
    assert repaired.code == 0, repaired.out + repaired.err
    assert chunks(root) == chunks(extraction)
    assert featurize("verify", root).code == 0


def test_a_block_that_nothing_vouches_for_is_made_again(root: Path, extraction: Path, featurize: Callable) -> None:
    """A flipped bit under a lost seal is not sealed in, nor are levels made of it."""
    flip(root, BASE)
    unseal(root, BASE)
    unseal(root, LEVEL)
    repaired = featurize("repair", root)
    assert repaired.code == 0, repaired.out + repaired.err
    assert chunks(root) == chunks(extraction)


@pytest.mark.parametrize("array", ["labels", BASE, LEVEL, Z0])
def test_a_damaged_digest_in_a_seal_is_repaired_in_one_run(
    array: str, root: Path, extraction: Path, featurize: Callable
) -> None:
    seal = root / f"{array}.seal.json"
    document = json.loads(seal.read_text())
    digest = document["blocks"][1]["sha256"]
    document["blocks"][1]["sha256"] = digest[::-1]
    seal.write_text(json.dumps(document))
    assert "its seal says another sha256" in featurize("verify", root).out
    repaired = featurize("repair", root)
    assert repaired.code == 0, repaired.out + repaired.err
    assert chunks(root) == chunks(extraction)


def test_labels_come_from_the_ledger(root: Path, extraction: Path, featurize: Callable) -> None:
    flip(root, "labels")
    assert "labels.zarr, block 1: has other bytes" in featurize("verify", root).out
    assert featurize("repair", root).code == 0
    assert chunks(root) == chunks(extraction)


def test_the_first_block_of_a_base_store_and_its_moments_come_back(
    root: Path, extraction: Path, featurize: Callable
) -> None:
    chunk(root, BASE, 0).unlink()
    assert featurize("repair", root).code == 0
    assert chunks(root) == chunks(extraction)
    moments = root / ENCODER / "moments.safetensors"
    moments.write_bytes(moments.read_bytes()[:100])
    assert "moments.safetensors beside it is damaged" in featurize("verify", root).out
    assert featurize("repair", root).code == 0
    assert chunks(root) == chunks(extraction)
    assert moments.read_bytes() == (extraction / ENCODER / "moments.safetensors").read_bytes()


def garble(path: Path) -> None:
    path.write_text(path.read_text()[:-40])


def change(path: Path) -> None:
    path.write_text(path.read_text().replace('"rows"', '"raws"', 1))


def other_codec(path: Path) -> None:
    path.write_text(path.read_text().replace('"little"', '"big"', 1))


@pytest.mark.parametrize("array", ["labels", BASE, LEVEL, Z0])
@pytest.mark.parametrize("harm", [garble, change, other_codec, Path.unlink])
def test_zarr_json_comes_back_from_the_seal(
    harm: Callable, array: str, root: Path, extraction: Path, featurize: Callable
) -> None:
    metadata = root / f"{array}.zarr" / "zarr.json"
    harm(metadata)
    found = featurize("verify", root)
    assert found.code == 1 and f"{array}.zarr: " in found.out and "zarr.json" in found.out, found.out + found.err
    repaired = featurize("repair", root)
    assert repaired.code == 0, repaired.out + repaired.err
    assert metadata.read_bytes() == (extraction / f"{array}.zarr" / "zarr.json").read_bytes()
    assert chunks(root) == chunks(extraction)


def test_a_seal_without_a_whole_copy_of_zarr_json(root: Path, extraction: Path, featurize: Callable) -> None:
    seal = root / f"{LEVEL}.seal.json"
    seal.write_text(seal.read_text().replace("bytes", "bites", 1))
    assert "the copy of zarr.json in its seal is damaged" in featurize("verify", root).out
    assert featurize("repair", root).code == 0
    assert chunks(root) == chunks(extraction)
    document = json.loads(seal.read_text())
    del document["metadata"], document["metadata_sha256"], document["seal_sha256"]  # a seal of an earlier version
    seal.write_text(json.dumps(document))
    assert featurize("verify", root).code == featurize("info", root).code == 0
    garble(root / f"{LEVEL}.zarr" / "zarr.json")
    flip(root, Z0)
    left = featurize("repair", root)
    assert left.code == 1
    assert "run again the command that made it" in left.out
    assert chunk(root, Z0, 1).read_bytes() == chunk(extraction, Z0, 1).read_bytes()


def flip_in_the_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 4] ^= 4
    path.write_bytes(bytes(data))


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:4])


@pytest.mark.parametrize("harm", [flip_in_the_middle, cut_off, Path.unlink])
def test_the_ledger_is_made_again_from_the_pictures(
    harm: Callable, root: Path, extraction: Path, featurize: Callable
) -> None:
    harm(root / "rows.parquet")
    found = featurize("verify", root)
    assert found.code == 1 and "rows.parquet" in found.out, found.out + found.err
    repaired = featurize("repair", root)
    assert repaired.code == 0, repaired.out + repaired.err
    assert pq.read_table(root / "rows.parquet").equals(pq.read_table(extraction / "rows.parquet"), check_metadata=True)


def test_no_ledger_of_other_pictures_is_written(
    root: Path, picture_folder: Path, tmp_path: Path, featurize: Callable
) -> None:
    other = shutil.copytree(picture_folder, tmp_path / "other")
    random_picture(99).save(other / "class-1" / "001.png")
    log = root / "extract.log.jsonl"
    log.write_text(log.read_text().replace(str(picture_folder), str(other)))
    (root / "rows.parquet").write_bytes(b"PAR1")
    outcome = featurize("repair", root)
    assert (outcome.code, "no longer those that the arrays were made of" in outcome.err) == (1, True), outcome.err
    assert (root / "rows.parquet").read_bytes() == b"PAR1"
    log.unlink()
    assert "run the same `featurize extract` again" in featurize("repair", root).err


def test_the_basis_is_fitted_again(root: Path, extraction: Path, featurize: Callable) -> None:
    basis = root / ENCODER / "basis.safetensors"
    flip_in_the_middle(basis)
    assert "basis.safetensors beside it is missing, damaged" in featurize("verify", root).out
    assert featurize("repair", root).code == 0
    assert basis.read_bytes() == (extraction / ENCODER / "basis.safetensors").read_bytes()
    assert not list(basis.parent.glob("*.parts"))


def test_a_basis_of_another_store_is_taken_again(
    extraction: Path, picture_folder: Path, vit_weights: Path, tmp_path: Path, featurize: Callable
) -> None:
    held_out = options(picture_folder, vit_weights, tmp_path / "val", limit=8, basis=str(extraction))
    extract(read_request(None, held_out, "1x1x16"), 0, None)
    basis = tmp_path / "val" / ENCODER / "basis.safetensors"
    before = basis.read_bytes()
    basis.unlink()
    assert featurize("repair", tmp_path / "val").code == 0
    assert basis.read_bytes() == before
    basis.unlink()
    (tmp_path / "val" / "extract.log.jsonl").unlink()
    assert "copy basis.safetensors from the training split's" in featurize("repair", tmp_path / "val").err


def test_no_block_of_z_0_is_made_by_another_codec(tmp_path: Path, featurize: Callable) -> None:
    vae, root = shutil.copytree(files("featurize") / "weights" / "tiny_vae", tmp_path / "vae"), tmp_path / "root"
    asked = {"source": "scenes:16", "out": str(root), "limit": 8, "z0": "vae:32", "z0_weights": str(vae)}
    extract(read_request(None, asked, "2x2x8"), 0, None)
    before = chunks(root)
    weights = vae / "diffusion_pytorch_model.safetensors"
    shutil.move(weights, tmp_path / "own")
    save_file({name: value * 1.5 for name, value in load_file(tmp_path / "own").items()}, weights)
    next((root / "vae").rglob("0/0/0/0/0")).unlink()
    refused = featurize("repair", root)
    assert (refused.code, "was made with another vae:32 (differs in: weights_sha256)" in refused.err) == (1, True), (
        refused
    )
    shutil.move(tmp_path / "own", weights)
    assert featurize("repair", root).code == 0
    assert chunks(root) == before


@pytest.mark.parametrize("array", [BASE, Z0])
def test_an_array_that_was_removed_without_its_seal_comes_back(
    array: str, root: Path, extraction: Path, picture_folder: Path, vit_weights: Path, featurize: Callable
) -> None:
    shutil.rmtree(root / f"{array}.zarr")
    request = options(picture_folder, vit_weights, root)
    outcome = featurize("extract", request["source"], *as_words(request))
    assert (outcome.code, "run `featurize repair` to fix it" in outcome.err) == (1, True), outcome.err
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
    del document["seal_sha256"]
    document["seal_sha256"] = json_sha256(document)
    seal.write_text(json.dumps(document))


def test_a_store_of_fewer_tokens_than_channels_is_whole(tmp_path: Path, featurize: Callable) -> None:
    """Half of the directions without variance have one below nothing, once rounded."""
    asked = {"source": "scenes:16", "out": f"{tmp_path}/root", "encoder": "tiny", "z0": "pixels:16", "limit": 1}
    extract(read_request(None, {**asked, "base_channels": 128, "basis_tolerance": 180.0}, "2x2x8"), 0, None)
    found = featurize("verify", tmp_path / "root")
    assert (found.code, "is whole: 4 arrays" in found.out) == (0, True), found.out


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


def test_a_level_made_on_another_processor_is_whole(root: Path, featurize: Callable) -> None:
    """Its sums may round to the next value of float16, in every row."""

    def next_to(values: np.ndarray) -> None:
        values[:] = np.nextafter(values, np.float16(9))

    rewrite(root, LEVEL, next_to)
    assert featurize("verify", root).code == 0


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
    for command, sentence in (
        ("verify", "is not a store root"),
        ("repair", "is not a store root"),
        ("ls", "holds no store root"),
    ):
        outcome = featurize(command, tmp_path)
        assert outcome.code == 1
        assert sentence in outcome.err
        assert not list(tmp_path.iterdir())


def test_ls_shows_every_root_and_array(extraction: Path, featurize: Callable) -> None:
    outcome = featurize("ls", extraction.parent)
    assert "60 rows of folder:" in outcome.out
    for name in ("labels.zarr", f"{BASE}.zarr", f"{LEVEL}.zarr", f"{Z0}.zarr"):
        assert any(name in line and "sealed" in line for line in outcome.out.splitlines())
    assert f"timm:{MODEL} " in outcome.out
