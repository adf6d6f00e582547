"""An extraction that the disk has no room for is refused before it writes; what is there already is not counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import disk_usage
from typing import Any

import pytest

from featurize.errors import UserError
from featurize.extraction import space
from featurize.extraction.extract import extract
from featurize.recipe import Features, Request

SCENES = {"source": "scenes:16", "encoder": "tiny", "z0": "pixels:16", "limit": 24, "basis_rows": 24}


@pytest.fixture
def sized(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """A disk with so many bytes left; what was asked of it."""

    def leave(free: int) -> list[int]:
        asked: list[int] = []
        needed = space.bytes_to_write
        monkeypatch.setattr(space, "bytes_to_write", lambda targets: asked.append(needed(targets)) or asked[-1])
        monkeypatch.setattr(space.shutil, "disk_usage", lambda path: disk_usage(path)._replace(free=free))
        return asked

    return leave


def request(out: Path, **more: Any) -> Request:
    return Request(features=Features(out=str(out), **SCENES, **more), levels=((2, 2, 8),))


def test_too_small_a_disk_is_one_sentence(tmp_path: Path, sized: Callable[[int], list[int]]) -> None:
    asked = sized(1000)
    with pytest.raises(
        UserError, match=r"needs \S+ GiB more, and its disk has 9\.31e-07 GiB left; free some, or give --out"
    ):
        extract(request(tmp_path / "s"), workers=0, scheduler=None)
    z0, level, labels = 24 * 16 * 16 * 3 * 2, 24 * 2 * 2 * 8 * 2, 24 * 8
    assert asked[0] > z0 + level + labels
    assert not list((tmp_path / "s").rglob("*.zarr/c/*"))


def test_what_is_there_needs_no_room(tmp_path: Path, sized: Callable[[int], list[int]]) -> None:
    extract(request(tmp_path / "s"), workers=0, scheduler=None)
    asked = sized(24 * 8 * 2)
    more = Request(features=request(tmp_path / "s").features, levels=((2, 2, 8), (1, 1, 8)))
    extract(more, workers=0, scheduler=None)
    assert all(needed <= 24 * 8 * 2 for needed in asked)
