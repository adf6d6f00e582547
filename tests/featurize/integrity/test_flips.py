"""One flipped bit in any file that an extraction writes is found or changes nothing, and `repair` brings back the bytes."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from featurize.errors import UserError
from featurize.execution.tasks import run_here
from featurize.extraction.extract import extract
from featurize.integrity.repair import repair
from featurize.integrity.verify import verify
from featurize.io.files import read_json
from featurize.recipe import read_request
from featurize.store.ledger import has_whole_content
from tests.featurize.conftest import options

FLIPS = 20
NOT_CHECKED = {"extract.log.jsonl", "rows.listing.json"}  # `repair` compares with digests; a run lists the source again


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def flip(path: Path, chance: random.Random) -> int:
    data = bytearray(path.read_bytes())
    place = chance.randrange(len(data))
    data[place] ^= 1 << chance.randrange(8)
    path.write_bytes(bytes(data))
    return place


def says_the_same(path: Path, whole: Path) -> bool:
    """Whether a changed file is read as the whole one is: the proof that a flip which nothing finds is harmless."""
    if path.suffix == ".parquet":
        return has_whole_content(path) and pq.read_table(path).equals(pq.read_table(whole), check_metadata=True)
    if path.suffix == ".safetensors":
        first, second = load_file(path), load_file(whole)
        return all(first[name].tobytes() == second[name].tobytes() for name in first.keys() | second.keys())
    return path.suffix in (".json", ".copy") and read_json(path) == read_json(whole)


def attack(whole: Path, wanted: dict[str, bytes], tmp_path: Path, flips: int) -> Counter[str]:
    """Flip a bit of one file after another, and repair; what came of it, counted."""
    outcomes: Counter[str] = Counter()
    before = {str(finding) for finding in verify(whole, run_here)}
    names = [name for name in files(whole) if name not in NOT_CHECKED]
    chance = random.Random(1)
    root = tmp_path / "flipped"
    for number in range(flips):
        name = names[number % len(names)]
        shutil.copytree(whole, root)
        place = flip(root / name, chance)
        found = {str(finding).replace(str(root), str(whole)) for finding in verify(root, run_here)}
        if found == before:
            assert says_the_same(root / name, whole / name), (name, place)
            outcomes["harmless"] += 1
        else:
            assert repair(root, run_here, lambda text: None) == [], (name, place)
            now = {key: data for key, data in files(root).items() if key not in NOT_CHECKED}
            assert now.keys() == wanted.keys()
            assert [key for key in wanted if now[key] != wanted[key]] == [], (name, place)
            outcomes["found"] += 1
        shutil.rmtree(root)
    return outcomes


def wanted(root: Path) -> dict[str, bytes]:
    return {key: data for key, data in files(root).items() if key not in NOT_CHECKED}


def test_a_flip_in_a_sealed_root(extraction: Path, tmp_path: Path) -> None:
    outcomes = attack(extraction, wanted(extraction), tmp_path, int(os.environ.get("FLIPS", FLIPS)))
    print(outcomes)
    assert outcomes["found"] >= 0.9 * outcomes.total()


def test_a_flip_in_an_unfinished_root(
    extraction: Path, picture_folder: Path, vit_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before the base store was sealed, and without the record of its last block."""
    root = tmp_path / "unfinished"

    def stop(*_: object) -> None:
        raise UserError("stopped")

    request = read_request(None, options(picture_folder, vit_weights, root), "2x2x8,1x1x16")
    with monkeypatch.context() as patch:
        patch.setattr("featurize.extraction.extract.measure_basis", stop)
        with pytest.raises(UserError, match="stopped"):
            extract(request, 0, None)
    for last in (*root.glob("*/base.blocks/000001.*"), *root.glob("*/base.zarr/c/1/0/0/0/0")):
        last.unlink()
    finished = {key: data for key, data in wanted(extraction).items() if "2x2x8" not in key and "1x1x16" not in key}
    outcomes = attack(root, finished, tmp_path, int(os.environ.get("FLIPS", FLIPS)))
    print(outcomes)
    assert outcomes["found"] >= 0.9 * outcomes.total()


def test_a_flip_in_what_was_listed_reads_the_source_again(
    extraction: Path, picture_folder: Path, vit_weights: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(extraction, tmp_path / "root")
    request = read_request(None, options(picture_folder, vit_weights, root), "2x2x8,1x1x16")
    for seed in range(6):
        flip(root / "rows.listing.json", random.Random(seed))
        extract(request, 0, None)
        assert wanted(root) == wanted(extraction)
