"""Blocks, records and seals on a real disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from featurize.errors import UserError
from featurize.store.layout import chunk_path, seal_path
from featurize.store.metadata import ArraySpec
from featurize.store.read import open_sealed, read_rows
from featurize.store.seal import seal, unseal
from featurize.store.write import prepare, write_block

VALUES = np.random.default_rng(0).normal(size=(10, 2, 3, 3, 4)).astype(np.float16)


def spec_of(path: Path, rows: int = 10, rows_per_block: int = 4, **provenance: object) -> ArraySpec:
    return ArraySpec(
        path,
        "level",
        (rows, *VALUES.shape[1:]),
        "float16",
        rows_per_block,
        "keys",
        {"how": "so", **provenance},
        {"extra": 1},
    )


def write_all(spec: ArraySpec) -> None:
    for block in prepare(spec):
        rows = spec.rows_of(block)
        write_block(spec, block, VALUES[rows.start : rows.stop])
    seal(spec)


def test_plain_zarr_reads_what_was_written_and_a_chunk_maps_into_memory(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "3x3x4.zarr")
    write_all(spec)
    array = zarr.open(str(spec.path), mode="r")
    np.testing.assert_array_equal(array[:], VALUES)
    assert (array.attrs["format"], array.attrs["rows"], array.attrs["views"], array.attrs["extra"]) == (
        "nested-store/1",
        10,
        2,
        1,
    )
    chunk = np.memmap(chunk_path(spec.path, 2, 5), dtype="<f2", mode="r", shape=(4, 2, 3, 3, 4))
    np.testing.assert_array_equal(chunk[:2], VALUES[8:])
    assert np.isnan(chunk[2:]).all()


def test_the_seal_holds_the_digest_of_every_chunk_file(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "a.zarr")
    write_all(spec)
    document = json.loads(seal_path(spec.path).read_text())
    for block, record in enumerate(document["blocks"]):
        data = chunk_path(spec.path, block, 5).read_bytes()
        assert record == {
            "rows": [block * 4, min(10, block * 4 + 4)],
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    assert not spec.path.with_suffix(".blocks").exists()


def test_a_block_without_record_is_done_again_and_a_sealed_array_not(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "a.zarr")
    assert prepare(spec) == [0, 1, 2]
    write_block(spec, 1, VALUES[4:8])
    assert prepare(spec) == [0, 2]
    with pytest.raises(UserError, match="unfinished"):
        open_sealed(spec.path)
    write_all(spec)
    assert prepare(spec) == []


def test_a_block_is_synced_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its chunk; not its record, without which it is done again; the folders of its chunk when the array is sealed."""
    spec = spec_of(tmp_path / "a.zarr")
    prepare(spec)
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
    write_block(spec, 0, VALUES[:4])
    chunk = chunk_path(spec.path, 0, 5)
    assert synced == [str(chunk)]
    write_all(spec)
    assert {str(folder) for folder in chunk.parents[:6]} <= set(synced)


@pytest.mark.parametrize("is_sealed", [True, False])
def test_something_else_at_the_path_is_refused_naming_the_difference_and_what_to_remove(
    tmp_path: Path, is_sealed: bool
) -> None:
    spec = spec_of(tmp_path / "a.zarr")
    write_all(spec) if is_sealed else prepare(spec)
    other = replace(spec, provenance={"how": "otherwise", "views": 1})
    with pytest.raises(UserError, match=r"differs in: how, views\)") as refused:
        prepare(other)
    beside = re.search(r"or remove it and (\S+) first\.$", str(refused.value))
    assert beside
    for path in (spec.path, Path(beside[1])):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_all(other)
    assert open_sealed(other.path).attrs["provenance"] == other.provenance


def test_a_late_task_of_an_ended_command_writes_nothing_into_the_next_ones_array(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "a.zarr")
    prepare(spec)
    for path in (spec.path, spec.path.with_suffix(".blocks")):
        shutil.rmtree(path)
    other = spec_of(spec.path, images="others")
    prepare(other)
    with pytest.raises(UserError, match=r"a\.zarr was begun anew by another command while a block of it was made; run"):
        write_block(spec, 0, VALUES[:4])
    assert prepare(other) == [0, 1, 2] and not chunk_path(other.path, 0, 5).exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])
def test_values_that_no_store_may_hold_are_refused(tmp_path: Path, bad: float) -> None:
    spec = spec_of(tmp_path / "a.zarr")
    prepare(spec)
    values = VALUES[:4].astype(np.float32)
    values[1, 0, 0, 0, 0] = bad
    with pytest.raises(UserError, match="NaN, infinite or too large"):
        write_block(spec, 0, values)
    assert 0 in prepare(spec)


@pytest.mark.parametrize("damage", ["truncate", "remove", "flip"])
def test_a_damaged_chunk_is_found_at_sealing_and_at_opening(tmp_path: Path, damage: str) -> None:
    def spoil(path: Path) -> None:
        data = path.read_bytes()
        if damage == "truncate":
            path.write_bytes(data[:-1])
        elif damage == "flip":
            path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        else:
            path.unlink()

    spec = spec_of(tmp_path / "a.zarr")
    for block in prepare(spec):
        rows = spec.rows_of(block)
        write_block(spec, block, VALUES[rows.start : rows.stop])
    spoil(chunk_path(spec.path, 1, 5))
    with pytest.raises(UserError, match="they are redone"):
        seal(spec)
    assert prepare(spec) == [1]
    write_all(spec)
    spoil(chunk_path(spec.path, 0, 5))
    if damage != "flip":  # opening looks at sizes only; `featurize verify` finds the rest
        with pytest.raises(UserError, match="is damaged"):
            open_sealed(spec.path)


def test_an_unsealed_array_lacks_its_bad_blocks_and_those_that_nothing_vouches_for(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "a.zarr")
    write_all(spec)
    sealed = seal_path(spec.path).read_bytes()
    records = json.loads(sealed)["blocks"]
    assert unseal(spec, {1}) == dict(enumerate(records))
    assert prepare(spec) == [1]
    write_block(spec, 1, VALUES[4:8])
    seal(spec)
    assert seal_path(spec.path).read_bytes() == sealed

    seal_path(spec.path).write_bytes(sealed.replace(records[2]["sha256"].encode(), b"0" * 64))
    assert unseal(spec, {2}) == {}
    assert prepare(spec) == [2]
    write_block(spec, 2, VALUES[8:])
    seal(spec)
    seal_path(spec.path).write_bytes(sealed[:-9])
    assert unseal(spec, set()) == {}
    assert prepare(spec) == [0, 1, 2]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20), st.sampled_from([None, 0, 1]))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
def test_rows_come_in_the_order_asked_for(tmp_path: Path, rows: list[int], view: int | None) -> None:
    spec = spec_of(tmp_path / "a.zarr")
    if not seal_path(spec.path).exists():
        write_all(spec)
    found = read_rows(open_sealed(spec.path), np.array(rows), view)
    np.testing.assert_array_equal(found, VALUES[rows] if view is None else VALUES[rows, view])
