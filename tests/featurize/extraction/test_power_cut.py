"""A power cut at any moment: what was not synced may be lost, names as well as content, and the same command goes on."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from featurize.execution.tasks import run_here
from featurize.extraction import block
from featurize.extraction.extract import extract
from featurize.integrity.verify import verify
from featurize.recipe import read_request
from featurize.store.metadata import ArraySpec, spec_of
from featurize.store.seal import unseal
from tests.featurize.conftest import chunks, options

CUTS = 10
CALLS = ("fsync", "replace", "unlink", "mkdir", "rmdir")


FOLDER = 0  # in place of an inode: a folder is known by its path


def entries(folder: Path) -> dict[str, int]:
    """The inode of each name in a folder; none where it is no more."""
    if not folder.is_dir():
        return {}
    return {entry.name: FOLDER if entry.is_dir() else entry.inode() for entry in os.scandir(folder)}


class Disk:
    """What the disk surely holds of a folder: the content and the names that were synced.

    A synced file is kept alive by a link in `held`, so that its inode, by which it is known, is not given to another.
    """

    def __init__(self, root: Path, held: Path) -> None:
        self.root, self.held = root, held
        self.names: dict[str, dict[str, int]] = {}  # by folder: the inode of each synced name
        self.synced: set[int] = set()

    def sync(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not path.is_relative_to(self.root.parent):
            return
        if path.is_dir():
            self.names[str(path)] = entries(path)
        elif (inode := path.stat().st_ino) not in self.synced:
            os.link(path, self.held / str(inode))
            self.synced.add(inode)

    def cut(self, to: Path, keep_names: Callable[[], bool], keep_content: Callable[[], bool]) -> None:
        """Copy what a power cut leaves. Of what is not synced, chance says what is on the disk all the same."""
        root = str(self.root)
        if self.root.name in self.names.get(str(self.root.parent), {}) or keep_names():
            self._copy(root, to, keep_names, keep_content)

    def _copy(self, folder: str, to: Path, keep_names: Callable[[], bool], keep_content: Callable[[], bool]) -> None:
        to.mkdir()
        now = entries(Path(folder))
        synced = self.names.get(folder, {})
        for name in now.keys() | synced.keys():
            inode = (
                now.get(name) if name in now and (now[name] == synced.get(name) or keep_names()) else synced.get(name)
            )
            source = os.path.join(folder, name)
            if inode is None:
                continue
            if inode == FOLDER:
                self._copy(source, to / name, keep_names, keep_content)
            elif inode in self.synced:
                shutil.copy(self.held / str(inode), to / name)
            elif inode == now.get(name):
                data = Path(source).read_bytes()
                (to / name).write_bytes(data if keep_content() else data[: len(data) // 2])


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    held = tmp_path / "held"
    held.mkdir()
    return Disk(tmp_path / "root", held)


def extract_with(disk: Disk, request: Any, at: dict[int, Callable[[int], None]]) -> int:
    """Extract, and call what is given for the n-th call that changes the disk, before it; how many there were."""
    count = 0
    with pytest.MonkeyPatch.context() as patch:

        def watched(name: str) -> Callable:
            call = getattr(os, name)

            def wrapped(target: Any, *others: Any, **named: Any) -> Any:
                nonlocal count
                count += 1
                with pytest.MonkeyPatch.context() as own:  # what the cut itself does is not watched
                    for each in CALLS:
                        own.setattr(os, each, originals[each])
                    if count in at:
                        at[count](count)
                    if name == "mkdir" and not os.path.exists(target):
                        disk.names.pop(str(target), None)
                    if name == "fsync":
                        disk.sync(target)
                return call(target, *others, **named)

            return wrapped

        originals = {name: getattr(os, name) for name in CALLS}
        for name in CALLS:
            patch.setattr(os, name, watched(name))
        extract(request, workers=0, scheduler=None)
    return count


def test_after_a_power_cut_the_same_command_goes_on(
    extraction: Path, picture_folder: Path, vit_weights: Path, disk: Disk, tmp_path: Path
) -> None:
    def request(root: Path) -> Any:
        return read_request(None, options(picture_folder, vit_weights, root), "2x2x8,1x1x16")

    dry = Disk(tmp_path / "dry" / "root", tmp_path / "dry" / "held")
    dry.held.mkdir(parents=True)
    calls = extract_with(dry, request(dry.root), {})
    cuts = int(os.environ.get("POWER_CUTS", CUTS))
    chance = random.Random(0)

    def cut(number: int) -> None:
        # In turn: nothing but what was synced; all names, but only synced content; chance for each.
        choices: list[Callable[[], bool]] = [lambda: False, lambda: True, lambda: chance.random() < 0.5]
        disk.cut(tmp_path / f"cut-{number}", choices[number % 3], choices[2 if number % 3 == 2 else 0])

    extract_with(disk, request(disk.root), dict.fromkeys(chance.sample(range(1, calls + 1), cuts), cut))
    for left in tmp_path.glob("cut-*"):
        assert verify_says_no_removal(left)
        extract(request(left), workers=0, scheduler=None)
        assert chunks(left) == chunks(extraction), left.name
        assert verify(left, run_here) == []


def verify_says_no_removal(root: Path) -> bool:
    if not (root / "rows.parquet").is_file():
        return True
    return not any("remove" in str(finding) for finding in verify(root, run_here))


def test_whole_blocks_are_kept_where_the_file_system_wrote_the_records(
    extraction: Path,
    picture_folder: Path,
    vit_weights: Path,
    disk: Disk,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As they do within half a minute, unasked: then every record counts, though none was synced."""
    left = tmp_path / "left"
    records: set[str] = set()

    def cut_at_last_record(number: int) -> None:
        found = {path.name for path in disk.root.glob("first-pass/*/base.blocks/*[0-9].json")}
        if len(found) == 1 and not left.exists():
            records.update(found)
            disk.cut(left, lambda: True, lambda: True)

    everywhere = dict.fromkeys(range(1, 2000), cut_at_last_record)
    extract_with(disk, read_request(None, options(picture_folder, vit_weights, disk.root), "2x2x8"), everywhere)
    written: list[int] = []
    write = block.write_block

    def counted(spec: ArraySpec, number: int, values: Any) -> None:
        if spec.path.name == "base.zarr":
            written.append(number)
        write(spec, number, values)

    monkeypatch.setattr(block, "write_block", counted)
    extract(read_request(None, options(picture_folder, vit_weights, left), "2x2x8,1x1x16"), workers=0, scheduler=None)
    assert records == {"000000.json"}
    assert not records & {f"{number:06d}.json" for number in written}
    assert chunks(left) == chunks(extraction)


@pytest.mark.parametrize("damage", ["none", "empty", "missing"])
@pytest.mark.parametrize("copy", ["whole", "missing"])
def test_an_unfinished_array_without_its_zarr_json_goes_on(
    damage: str, copy: str, extraction: Path, picture_folder: Path, vit_weights: Path, tmp_path: Path
) -> None:
    """Without the copy among its records too, as earlier versions left it: then from its first block."""
    root = shutil.copytree(extraction, tmp_path / "root")
    (base,) = root.glob("*/base.zarr")
    for folder in ("2x2x8", "1x1x16"):
        shutil.rmtree(base.with_name(f"{folder}.zarr"))
        base.with_name(f"{folder}.seal.json").unlink()
    unseal(spec_of(base), {0})
    if damage == "empty":
        (base / "zarr.json").write_bytes(b"")
    elif damage == "missing":
        (base / "zarr.json").unlink()
    if copy == "missing":
        (base.with_suffix(".blocks") / "zarr.json.copy").unlink()
    assert verify_says_no_removal(root)
    extract(read_request(None, options(picture_folder, vit_weights, root), "2x2x8,1x1x16"), 0, None)
    assert chunks(root) == chunks(extraction)
