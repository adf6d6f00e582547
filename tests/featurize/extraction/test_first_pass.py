"""The first pass decodes each picture once and leaves the store that a scan before the encoding left, whatever is refused."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from upath import UPath

from featurize.encoders import onednn, registry
from featurize.errors import UserError
from featurize.execution.tasks import run_here
from featurize.extraction import block, first_pass, fit, reading, targets
from featurize.extraction.scan import make_ledger
from featurize.images.crop import SQUARE
from featurize.io import addresses
from featurize.io.files import move
from featurize.sources import list_images
from featurize.store.layout import draft_ledger_path, first_pass_folder
from tests.featurize.conftest import chunks, random_picture
from tests.featurize.extraction import refused
from tests.featurize.extraction.refused import CASES, PICTURES, ROWS_PER_BLOCK, extract_source, write_source


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "MAX_ROWS_PER_BLOCK", ROWS_PER_BLOCK)
    monkeypatch.setattr(fit, "IMAGES_PER_TASK", 16)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each picture's bytes are read to be decoded."""
    counts: Counter[str] = Counter()
    read = reading._read_listed

    def counted(image: Any, *others: Any) -> bytes:
        counts[image.key] += 1
        return read(image, *others)

    monkeypatch.setattr(reading, "_read_listed", counted)
    return counts


def files(root: Path) -> dict[str, bytes]:
    """All files of a root but its log, which has times, and the name of the listing."""
    found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if name not in ("extract.log.jsonl", "rows.listing.json")}


@pytest.mark.parametrize(("percent", "basis_rows"), CASES)
def test_the_store_is_that_of_the_commit_before(
    percent: int, basis_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = json.loads(refused.RECORDED.read_text())
    if recorded["machine"] != refused.machine():
        pytest.skip("recorded with other libraries, or on another processor")
    monkeypatch.setattr(onednn, "is_intel", lambda: False)  # linear layers are computed as they were
    registry._load_identified.cache_clear()
    monkeypatch.setattr(fit, "IMAGES_PER_TASK", 256)  # parts decide the order of sums
    write_source(tmp_path / "source", percent)
    extract_source(tmp_path / "source", tmp_path / "root", basis_rows)
    registry._load_identified.cache_clear()
    index = CASES.index((percent, basis_rows))
    before, now = recorded["stores"][index]["says"], refused.summary(tmp_path / "root")
    if percent and basis_rows < PICTURES:
        # Batches hold the pictures of a draft's block, and so other ones after a gap: sums over tokens have other last bits.
        for says in (before, now):
            del says["tiny/moments.safetensors"]
        numbers = [
            np.array([*seal["basis_drift"].values(), *seal["features"].values()])
            for seal in (before["tiny/base.seal.json"], now["tiny/base.seal.json"])
        ]
        np.testing.assert_allclose(*numbers, rtol=1e-7)
        for says in (before, now):
            del says["tiny/base.seal.json"]["basis_drift"], says["tiny/base.seal.json"]["features"]
    assert now == before


def test_two_workers_leave_the_bytes_of_a_scan_before_the_encoding(tmp_path: Path) -> None:
    """Where the fit sees all pictures, all bytes: the ledger's, the seals', the moments'."""
    source = tmp_path / "source"
    write_source(source, 7)
    listing = list_images(f"folder:{source}", "train", None)
    make_ledger(tmp_path / "before", f"folder:{source}", listing, SQUARE, "50%", run_here)
    extract_source(source, tmp_path / "before", PICTURES)
    extract_source(source, tmp_path / "now", PICTURES, workers=2)
    before, now = files(tmp_path / "before"), files(tmp_path / "now")
    assert now.keys() == before.keys()
    assert [name for name in now if now[name] != before[name]] == []


def test_each_picture_is_decoded_once_and_those_of_the_fit_twice(tmp_path: Path, decoded: Counter[str]) -> None:
    write_source(tmp_path / "source", 0)
    extract_source(tmp_path / "source", tmp_path / "root", 48)
    assert Counter(decoded.values()) == {1: PICTURES - 48, 2: 48}


def test_blocks_get_their_places_without_being_synced_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk once, and the base store's moments; records and what is known of pictures not at all: a lost one is made again."""
    write_source(tmp_path / "source", 0)
    kinds = {
        "chunk": r"\.zarr/c(/\d+){5}$",
        "record": r"/(base|\w+x\w+)\.blocks/\.\d{6}\.json",
        "moments": r"/base\.blocks/\.\d{6}\.moments",
        "known": r"/first-pass/examined/\.\w",
    }
    synced: Counter[str] = Counter()

    def counted(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        synced.update(kind for kind, pattern in kinds.items() if re.search(pattern, path))

    monkeypatch.setattr(os, "fsync", counted)
    extract_source(tmp_path / "source", tmp_path / "root", 48)
    blocks, arrays = -(-PICTURES // ROWS_PER_BLOCK), 4  # the base store, z_0 and two levels
    assert synced == {"chunk": arrays * blocks, "moments": blocks}


def test_a_stopped_first_pass_goes_on(tmp_path: Path, decoded: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of its blocks, then while these get their places; the finished ones are not encoded again."""
    source, root = tmp_path / "source", tmp_path / "root"
    write_source(source, 7)
    extract_source(source, tmp_path / "undisturbed", 48)

    def stops_at(count: int, function: Callable) -> Callable:
        calls = iter(range(count))

        def wrapped(*arguments: Any) -> Any:
            if next(calls, None) is None:
                raise UserError("stopped")
            return function(*arguments)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(block, "_write_block", stops_at(3, block._write_block))
        with pytest.raises(UserError, match="stopped"):
            extract_source(source, root, 48)
    assert not (root / "rows.parquet").exists()
    decoded.clear()
    with monkeypatch.context() as patch:
        patch.setattr(first_pass, "_place", stops_at(2, first_pass._place))
        with pytest.raises(UserError, match="stopped"):
            extract_source(source, root, None)  # as many as it was begun with
    assert 0 < len(decoded) <= PICTURES - 3 * ROWS_PER_BLOCK
    decoded.clear()
    extract_source(source, root, 48)
    assert not decoded
    assert not first_pass_folder(root).exists()
    assert files(root) == files(tmp_path / "undisturbed")


def test_changed_pictures_begin_the_first_pass_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "source"
    write_source(source, 0)
    with monkeypatch.context() as patch:
        patch.setattr(first_pass, "write_images", None)
        with pytest.raises(TypeError):
            extract_source(source, tmp_path / "root", 48)
    random_picture(1, 20, 18).save(source / "005.ppm")
    extract_source(source, tmp_path / "root", 48)
    assert "begins anew" in caplog.text
    extract_source(source, tmp_path / "other", 48)
    assert files(tmp_path / "root") == files(tmp_path / "other")


def test_a_late_task_of_other_pictures_writes_nothing_into_the_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker of a cluster does it though its command has ended, when the next command has begun the draft anew."""
    source, root = tmp_path / "source", tmp_path / "root"
    write_source(source, 0)
    late: list[block.BlockTask] = []
    write = block._write_block
    with monkeypatch.context() as patch:
        patch.setattr(block, "_write_block", late.append)
        with pytest.raises(AttributeError):
            extract_source(source, root, 48)
    random_picture(1, 20, 18).save(source / "005.ppm")

    def after_the_late_one(task: block.BlockTask) -> block.Done:
        with pytest.raises(UserError, match="was begun anew by another command"):
            write(late[0])
        return write(task)

    with monkeypatch.context() as patch:
        patch.setattr(block, "_write_block", after_the_late_one)
        extract_source(source, root, 48)
    extract_source(source, tmp_path / "other", 48)
    assert files(root) == files(tmp_path / "other")


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_kill_between_the_move_of_a_chunk_and_of_its_record_is_gone_on_after(
    on_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    write_source(source, 0)
    root = tmp_path / "root" if on_disk else UPath("memory://first-pass/killed")
    kept = iter(range(1))

    def killed(old: Path, new: Path) -> None:
        if next(kept, None) is None:
            raise KeyboardInterrupt
        move(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(first_pass, "move", killed)
        with pytest.raises(KeyboardInterrupt):
            extract_source(source, root, 48)
    extract_source(source, root, 48)
    extract_source(source, tmp_path / "undisturbed", 48)
    assert not first_pass_folder(root).exists()
    assert chunks(root) == chunks(tmp_path / "undisturbed")


@pytest.mark.parametrize("left_out", [False, True])
def test_files_get_their_rows_once_they_may_be_read(
    left_out: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """chmod changes neither time nor size. With `left_out` the basis was fitted without them, and the run stopped after it."""
    source, root = tmp_path / "source", tmp_path / "root"
    write_source(source, 0)
    extract_source(source, tmp_path / "undisturbed", 48)
    read, denied = addresses._read_local, sorted(source.iterdir())[::5]

    def may_not(address: str, offset: int, size: int) -> bytes:  # root may read a file of any mode
        if Path(address) in denied:
            raise PermissionError(13, "Permission denied", address)
        return read(address, offset, size)

    with monkeypatch.context() as patch:
        patch.setattr(addresses, "_read_local", may_not)
        if left_out:
            patch.setattr(block, "_write_block", None)
        for _ in range(2):
            with pytest.raises(TypeError if left_out else UserError):
                extract_source(source, root, 48, max_bad="50%" if left_out else 0)
    assert "begins anew" not in caplog.text
    extract_source(source, root, 48, max_bad=0)
    assert ("begins anew" in caplog.text) == left_out
    assert files(root) == files(tmp_path / "undisturbed")


def test_too_many_refused_pictures_stop_the_first_pass_early(tmp_path: Path, decoded: Counter[str]) -> None:
    write_source(tmp_path / "source", 40)
    root = tmp_path / "root"
    with pytest.raises(
        UserError, match=r"of the \d+ pictures that were tried can't be read, more than --max-bad 3 allows"
    ):
        extract_source(tmp_path / "source", root, 48, max_bad=3)
    assert draft_ledger_path(root).exists()
    assert len(decoded) <= 32
