"""The ledger: every picture has a row or a reason, and --max-bad stops what is mostly garbage without losing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurize import ledger as ledger_
from featurize.errors import UserError
from featurize.ledger import allowed_bad, draft_path, ledger_path, make_ledger
from featurize.sources import list_pictures

from .conftest import options, random_picture


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
    listing = list_pictures(f"folder:{mixed_folder}", "train", None)
    root = tmp_path / "out"
    if stops:
        with pytest.raises(UserError, match=f"4 of 12 pictures can't be read, more than --max-bad {max_bad} allows"):
            make_ledger(root, "folder", listing, max_bad, here)
        assert not ledger_path(root).exists()
        lines = pq.read_table(draft_path(root)).to_pylist()
    else:
        assert make_ledger(root, "folder", listing, max_bad, here).rows == 8
        assert not draft_path(root).exists()
        lines = pq.read_table(ledger_path(root)).to_pylist()
    assert [line["key"] for line in lines if line["status"] == "refused"] == [f"a.{n:02d}.png" for n in (0, 3, 6, 9)]
    assert lines[0]["reason"] == "the file is empty"


def test_garbage_stops_the_run_early_and_the_draft_says_which(
    mixed_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_, "PER_TASK", 2)
    listing = list_pictures(f"folder:{mixed_folder}", "train", None)
    with pytest.raises(UserError) as stopped:
        make_ledger(tmp_path / "out", "folder", listing, "10%", here)
    # The second bad picture, a.03, is in the second part of two: the other eight are not looked at.
    assert "2 of the first 4 pictures can't be read" in str(stopped.value)
    assert "1 times 'the file is empty' (first: a.00.png)" in str(stopped.value)
    assert "1 times 'no picture of a known format" in str(stopped.value)
    assert [line["key"] for line in pq.read_table(draft_path(tmp_path / "out")).to_pylist()] == [
        f"a.{n:02d}.png" for n in range(4)
    ]
    for path in (mixed_folder / "a.00.png", mixed_folder / "a.03.png"):
        random_picture(0).save(path)
    relisted = list_pictures(f"folder:{mixed_folder}", "train", 6)
    assert make_ledger(tmp_path / "out", "folder", relisted, "10%", here).rows == 6
    assert not draft_path(tmp_path / "out").exists()


def test_nothing_but_garbage_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no")
    listing = list_pictures(f"folder:{tmp_path}", "train", None)
    with pytest.raises(UserError, match="None of the 1 pictures can be read: 1 times"):
        make_ledger(tmp_path / "out", "folder", listing, 100, here)


@given(st.integers(0, 10_000), st.integers(0, 2_000_000))
def test_a_share_is_exact(hundredths: int, pictures: int) -> None:
    share = f"{hundredths // 100}.{hundredths % 100:02d}%"
    assert allowed_bad(share, pictures) == hundredths * pictures // 10_000


@pytest.mark.parametrize("max_bad", ["-1", "1.5", "101%", "many", "1 %"])
def test_another_max_bad_is_one_sentence(
    max_bad: str, picture_folder: Path, vit_weights: Path, tmp_path: Path, featurize: Callable
) -> None:
    wanted = options(picture_folder, vit_weights, tmp_path / "out")
    outcome = featurize("extract", wanted["source"], "--out", wanted["out"], f"--max-bad={max_bad}")
    assert outcome.code == 1
    assert "a count like 100 or a share like 1%" in outcome.err
