"""The ledger: every picture has a row or a reason, and --max-bad stops what is mostly garbage without losing it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featurize.errors import UserError
from featurize.extraction import scan
from featurize.extraction.scan import allowed_bad, make_ledger
from featurize.images.crop import SQUARE
from featurize.io import addresses
from featurize.recipe import read_request
from featurize.sources import Listing, SourceImage, list_images
from featurize.store.layout import draft_ledger_path, ledger_path
from featurize.store.ledger import ledger_of_listing, read_ledger, unchanged_ledger
from tests.featurize.conftest import random_picture


def here(function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """The engine without threads' limits: one task after the other."""
    for index, task in enumerate(tasks):
        yield index, function(task)


@pytest.fixture
def mixed_folder(tmp_path: Path) -> Path:
    """Twelve files of which every third is damaged: a.00.png, ..."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for index in range(12):
        random_picture(index).save(folder / f"a.{index:02d}.png")
        if index % 3 == 0:
            (folder / f"a.{index:02d}.png").write_bytes(b"garbage" * index)
    return folder


@pytest.mark.parametrize(("max_bad", "stops"), [(3, True), (4, False), ("33%", True), ("34%", False), ("100%", False)])
def test_max_bad_is_a_count_or_a_share(mixed_folder: Path, tmp_path: Path, max_bad: int | str, stops: bool) -> None:
    listing = list_images(f"folder:{mixed_folder}", "train", None)
    root = tmp_path / "out"
    if stops:
        with pytest.raises(UserError, match=f"4 of 12 pictures can't be read, more than --max-bad {max_bad} allows"):
            make_ledger(root, "folder", listing, SQUARE, max_bad, here)
        assert not ledger_path(root).exists()
        lines = pq.read_table(draft_ledger_path(root)).to_pylist()
    else:
        assert make_ledger(root, "folder", listing, SQUARE, max_bad, here).rows == 8
        assert not draft_ledger_path(root).exists()
        lines = pq.read_table(ledger_path(root)).to_pylist()
    assert [line["key"] for line in lines if line["status"] == "refused"] == [f"a.{n:02d}.png" for n in (0, 3, 6, 9)]
    assert lines[0]["reason"] == "the file is empty"


def test_garbage_stops_the_run_early_and_the_draft_says_which(
    mixed_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "IMAGES_PER_TASK", 2)
    listing = list_images(f"folder:{mixed_folder}", "train", None)
    with pytest.raises(UserError) as stopped:
        make_ledger(tmp_path / "out", "folder", listing, SQUARE, "10%", here)
    # The second bad picture, a.03, is in the second part of two: the other eight are not looked at.
    assert "2 of the 4 pictures that were tried can't be read" in str(stopped.value)
    assert "1 times 'the file is empty' (first: a.00.png)" in str(stopped.value)
    assert "1 times 'no picture of a known format" in str(stopped.value)
    assert [line["key"] for line in pq.read_table(draft_ledger_path(tmp_path / "out")).to_pylist()] == [
        f"a.{n:02d}.png" for n in range(4)
    ]
    for path in (mixed_folder / "a.00.png", mixed_folder / "a.03.png"):
        random_picture(0).save(path)
    relisted = list_images(f"folder:{mixed_folder}", "train", 6)
    assert make_ledger(tmp_path / "out", "folder", relisted, SQUARE, "10%", here).rows == 6
    assert not draft_ledger_path(tmp_path / "out").exists()


def test_nothing_but_garbage_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no")
    listing = list_images(f"folder:{tmp_path}", "train", None)
    with pytest.raises(UserError, match="None of the 1 pictures can be read: 1 times"):
        make_ledger(tmp_path / "out", "folder", listing, SQUARE, 100, here)


@given(st.integers(0, 10_000), st.integers(0, 2_000_000))
def test_a_share_is_exact(hundredths: int, pictures: int) -> None:
    share = f"{hundredths // 100}.{hundredths % 100:02d}%"
    assert allowed_bad(share, pictures) == hundredths * pictures // 10_000


@pytest.mark.parametrize("max_bad", ["-1", "1.5", "101%", "many", "1 %", True, None])
def test_another_max_bad_is_one_sentence(max_bad: object) -> None:
    with pytest.raises(UserError, match=r"^--max-bad is .* a count like 100 or a share like 1%"):
        read_request(None, {"out": "x", "max_bad": max_bad}, None)


kinds = st.lists(st.sampled_from(["good", "empty", "garbage", "cut", "lost", "again"]), min_size=1, max_size=8)


@settings(max_examples=20)
@given(kinds=kinds)
def test_rows_in_are_rows_stored_and_rows_refused(tmp_path_factory: pytest.TempPathFactory, kinds: list[str]) -> None:
    """Any mix of good and bad pictures: each is stored or refused with a reason, and label and captions are those of its key."""
    folder = tmp_path_factory.mktemp("mix")
    pictures = []
    for index, kind in enumerate(kinds):
        path = folder / f"{index}.png"
        random_picture(index, 12, 10).save(path)
        data = {"empty": b"", "garbage": b"x" * 99, "cut": path.read_bytes()[:-25]}.get(kind, path.read_bytes())
        path.write_bytes(data)
        if kind == "lost":
            path.unlink()
        key = "0" if kind == "again" else str(index)
        pictures.append(SourceImage(key, str(path), 0, len(data), index % 3, (f"caption {index}",)))
    good = [index for index, kind in enumerate(kinds) if kind == "good" or (kind == "again" and index == 0)]
    if not good:
        with pytest.raises(UserError, match="None of the"):
            make_ledger(folder / "out", "mix", Listing(tuple(pictures)), SQUARE, "100%", here)
        return
    ledger = make_ledger(folder / "out", "mix", Listing(tuple(pictures)), SQUARE, "100%", here)
    lines = pq.read_table(ledger_path(folder / "out")).to_pylist()
    assert len(lines) == len(kinds) == ledger.rows + ledger.refused
    assert [index for index, line in enumerate(lines) if line["row"] is not None] == good
    assert all(bool(line["reason"]) == (line["row"] is None) == (line["status"] == "refused") for line in lines)
    assert [(p.key, p.label, p.captions) for p in ledger.images] == [
        (pictures[index].key, index % 3, (f"caption {index}",)) for index in good
    ]
    assert ledger.labels.tolist() == [index % 3 for index in good]


def test_the_ledger_of_shards_has_the_same_bytes_wherever_and_whenever_it_is_made(shard: Path, tmp_path: Path) -> None:
    """After a kill, say: folders beside the shard have come and gone, and the shard itself was written again."""
    copy = shutil.copy(shard, tmp_path / "a.tar")
    arguments = (f"wds:{copy}", "train", None, None)
    make_ledger(tmp_path / "first", arguments[0], list_images(*arguments), SQUARE, 0, here, arguments)
    assert unchanged_ledger(tmp_path / "first", arguments) is not None
    (tmp_path / "another").mkdir()
    assert unchanged_ledger(tmp_path / "first", arguments) is None
    os.utime(copy, (1, 1))
    make_ledger(tmp_path / "second", arguments[0], list_images(*arguments), SQUARE, 0, here, arguments)
    assert ledger_path(tmp_path / "first").read_bytes() == ledger_path(tmp_path / "second").read_bytes()
    assert ledger_of_listing(tmp_path / "second", list_images(*arguments)) is not None
    assert ledger_of_listing(tmp_path / "first", list_images(*arguments)) is None


@pytest.mark.parametrize("change", ["renamed", "retyped", "missing"])
def test_a_ledger_of_other_columns_is_one_sentence(change: str, mixed_folder: Path, tmp_path: Path) -> None:
    make_ledger(tmp_path, "folder", list_images(f"folder:{mixed_folder}", "train", None), SQUARE, 4, here)
    table = pq.read_table(ledger_path(tmp_path))
    if change == "renamed":
        table = table.rename_columns([name.replace("label", "lebal") for name in table.column_names])
    elif change == "retyped":
        table = table.set_column(0, "row", table["row"].cast("uint32"))
    else:
        table = table.drop_columns(["box"])
    pq.write_table(table, ledger_path(tmp_path))
    with pytest.raises(UserError, match=r"rows\.parquet is damaged .*`featurize repair` makes it again"):
        read_ledger(tmp_path)


def test_pictures_that_vanish_while_they_are_read_stop_the_run(
    mixed_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a mount goes away: nothing is refused for good, and the same command goes on when it is back."""
    monkeypatch.setattr(scan, "IMAGES_PER_TASK", 4)
    listing = list_images(f"folder:{mixed_folder}", "train", None)
    gone = tmp_path / "gone"

    def unmounting(function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        for index, task in enumerate(tasks):
            if index == 1:
                mixed_folder.rename(gone)
            yield index, function(task)

    with pytest.raises(UserError, match=r"a\.04\.png .* can't be read any more .*: is a disk or network share gone\?"):
        make_ledger(tmp_path / "out", "folder", listing, SQUARE, 100, unmounting)
    assert not ledger_path(tmp_path / "out").exists()
    gone.rename(mixed_folder)
    assert make_ledger(tmp_path / "out", "folder", listing, SQUARE, 100, here).rows == 8


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN])
def test_a_disk_that_fails_stops_the_run(
    number: int, mixed_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = list_images(f"folder:{mixed_folder}", "train", None)

    def fail(address: str, offset: int, size: int) -> bytes:
        raise OSError(number, os.strerror(number), address)

    monkeypatch.setattr(addresses, "_read_local", fail)
    monkeypatch.setattr(addresses, "DEADLINE", 0.1)
    with pytest.raises(UserError, match=rf"can't be read any more \({os.strerror(number)}\)"):
        make_ledger(tmp_path / "out", "folder", listing, SQUARE, 100, here)


def test_a_picture_that_is_still_being_copied_stops_the_run(mixed_folder: Path, tmp_path: Path) -> None:
    listing = list_images(f"folder:{mixed_folder}", "train", None)
    (mixed_folder / "a.05.png").write_bytes((mixed_folder / "a.05.png").read_bytes()[:-25])
    with pytest.raises(UserError, match=r"a\.05\.png .* when it was listed: is it still being copied"):
        make_ledger(tmp_path / "out", "folder", listing, SQUARE, 100, here)
