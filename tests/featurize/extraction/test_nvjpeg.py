"""JPEGs that a GPU decodes become the same rows; a GPU's own workers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from featurize.errors import UserError
from featurize.execution.tasks import run_here
from featurize.extraction import loader, networks, reading
from featurize.extraction.extract import extract
from featurize.images import on_device
from featurize.integrity.reencode import spot_check
from featurize.recipe import read_request
from tests.featurize.conftest import as_words, chunks, options


def arrays(root: Path) -> dict[str, bytes]:
    """Every chunk of a store root."""
    return {name: data for name, data in chunks(root).items() if "/c/" in name}


@pytest.fixture
def as_nvjpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's decoder of a CPU, whose pixels are Pillow's, in the place of its nvJPEG: it is called in the same way."""
    for module in (on_device, networks):
        monkeypatch.setattr(module, "require_nvjpeg", lambda device: None)


@pytest.mark.parametrize("decoders", [0, 1, 4])
def test_files_left_to_nvjpeg_become_the_same_rows(
    extraction: Path, picture_folder: Path, vit_weights: Path, tmp_path: Path, decoders: int, as_nvjpeg: None
) -> None:
    """Half of the pictures are PNG, which Pillow decodes. It is another identity, and --strict can't be kept with it."""
    asked = options(picture_folder, vit_weights, tmp_path / "root", decoder="nvjpeg")
    extract(read_request(None, asked, "2x2x8,1x1x16"), workers=0, scheduler=None, decoders=decoders)
    assert arrays(tmp_path / "root") == arrays(extraction)
    assert pq.read_table(tmp_path / "root" / "rows.parquet").equals(pq.read_table(extraction / "rows.parquet"))
    assert spot_check(tmp_path / "root", 8, 0, run_here) == []
    with pytest.raises(UserError, match=r"differs in: decoder"):
        extract(read_request(None, asked | {"decoder": "pillow"}, "2x2x8"), workers=0, scheduler=None)
    with pytest.raises(UserError, match="leave out one of the two"):
        extract(read_request(None, asked | {"strict": True, "out": str(tmp_path / "new")}, "2x2x8"), 0, scheduler=None)
    other = asked | {"strict": True, "decoder": "pillow", "z0": "pixels:8"}
    with pytest.raises(UserError, match="was begun with --decoder nvjpeg, which does not look for damaged JPEGs"):
        extract(read_request(None, other, "2x2x8"), workers=0, scheduler=None)


def test_pillow_judges_what_nvjpeg_refuses(
    picture_folder: Path, vit_weights: Path, tmp_path: Path, as_nvjpeg: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three files are left to nvJPEG that it does not decode: what Pillow can is stored, and the rest refused."""
    pictures = shutil.copytree(picture_folder / "class-0", tmp_path / "pictures")
    sound = (pictures / "006.jpg").read_bytes()
    for name in ("003.jpg", "zzz.jpg"):
        (pictures / name).write_bytes(sound[:200])
    expected = options(pictures, vit_weights, tmp_path / "pillow")
    extract(read_request(None, expected, "2x2x8"), workers=0, scheduler=None)

    decode_jpegs = on_device._decode

    def refusing(files: list[torch.Tensor], device: str) -> list[torch.Tensor]:
        if any(bytes(file.numpy()) == sound for file in files):
            raise RuntimeError("nvjpegDecode failed: 5")
        return decode_jpegs(files, device)

    monkeypatch.setattr(on_device, "_decode", refusing)
    left = reading.size_for_nvjpeg
    monkeypatch.setattr(
        reading, "size_for_nvjpeg", lambda data, icc: (9, 9) if data == sound[:200] else left(data, icc)
    )
    monkeypatch.setattr(loader, "SLOT", 3000)  # for some files too short, which go the other way
    asked = options(pictures, vit_weights, tmp_path / "nvjpeg", decoder="nvjpeg")
    extract(read_request(None, asked, "2x2x8"), workers=0, scheduler=None)
    assert arrays(tmp_path / "nvjpeg") == arrays(tmp_path / "pillow")
    found, same = (pq.read_table(tmp_path / name / "rows.parquet") for name in ("nvjpeg", "pillow"))
    assert found.equals(same) and found["row"].null_count == 2


def test_nvjpeg_needs_a_gpu(picture_folder: Path, vit_weights: Path, tmp_path: Path, featurize: Callable) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    words = as_words(options(picture_folder, vit_weights, tmp_path / "root"))
    outcome = featurize("extract", f"folder:{picture_folder}", *words, "--decoder", "nvjpeg")
    assert outcome.code == 1 and "decodes on an NVIDIA GPU, and there is none here" in outcome.err
    assert not (tmp_path / "root" / "rows.parquet").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpus_own_workers(picture_folder: Path, vit_weights: Path, tmp_path: Path, featurize: Callable) -> None:
    """What they write is what a CPU encodes again, within float16."""
    extract(read_request(None, options(picture_folder, vit_weights, tmp_path), "2x2x8"), workers=None, scheduler=None)
    assert featurize("verify", tmp_path, "--re-encode", 4).code == 0
