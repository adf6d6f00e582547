"""Real photographs through MoCo-v3 and CLIP in their official layouts (random weights): labels and captions by key."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from PIL import Image
from torchvision import transforms

from featurize.encoders import EncoderSpec, encode, load_encoder
from featurize.extraction.extract import extract
from featurize.recipe import read_request
from featurize.text.tower import TextSpec, load_text_encoder
from tests.featurize.layouts import clip_state, described, moco_file, moco_state, torchscript_clip

SMALL = {"img_size": 64, "embed_dim": 32, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def mocov3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moco_file(tmp_path_factory.mktemp("moco") / "vit-b-300ep.pth.tar", moco_state(32, 1, 4), **SMALL)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """OpenAI's archive of a small CLIP, and its text tower as a file of its own."""
    folder = tmp_path_factory.mktemp("clip")
    state = clip_state(32, 1, 16, 4, 8, (16, 1, 77))
    archive = torchscript_clip(folder / "ViT-B-16.pt", state)
    described(archive, img_size=64, width=32, layers=1, heads=2, embed_dim=8)
    torch.save(state, folder / "text.pt")
    return archive, described(folder / "text.pt", width=16, layers=1, heads=2)


def run(source: str, out: Path, encoder: str, weights: Path, **more: Any) -> tuple[list[dict[str, Any]], zarr.Array]:
    """Extract; every line of the ledger, and the base store, whose rows are those that were not refused."""
    asked = {"source": source, "out": str(out), "encoder": encoder, "weights": str(weights), "z0": "pixels:16"}
    extract(read_request(None, {**asked, "base_channels": 32, **more}, "2x2x8"), workers=0, scheduler=None)
    lines = pq.read_table(out / "rows.parquet").to_pylist()
    base = zarr.open_array(str(out / encoder / "base.zarr"), mode="r")
    stored = [line for line in lines if line["row"] is not None]
    assert len(lines) == len(stored) + sum(line["status"] == "refused" for line in lines)
    assert base.shape == (len(stored), 1, 4, 4, 32)
    assert [line["row"] for line in stored] == list(range(len(stored)))
    return stored, base


def unprojected(out: Path, encoder: str, base: zarr.Array, row: int) -> np.ndarray:
    """The row's tokens: all 32 channels are kept, so the basis turns back."""
    from featurize.basis.svd import load_basis

    basis = load_basis(out / encoder / "basis.safetensors")
    return base[row, 0].astype(np.float64) @ basis.components[:, :32].T + basis.mean


def test_imagenettes_pictures_keep_their_classes(real_data: Path, tmp_path: Path, mocov3: Path) -> None:
    tree = tmp_path / "tree" / "train"
    for folder in sorted((real_data / "imagenette" / "train").iterdir()):
        (tree / folder.name).mkdir(parents=True)
        for picture in sorted(folder.iterdir())[:2]:
            (tree / folder.name / picture.name).symlink_to(picture)
    lines, base = run(f"imagenet:{tree.parent}", tmp_path / "out", "mocov3", mocov3, crop="official")
    wnids = sorted(folder.name for folder in tree.iterdir())
    assert len(lines) == 20
    labels = zarr.open_array(str(tmp_path / "out" / "labels.zarr"), mode="r")
    for line in lines:
        assert wnids[line["label"]] == Path(line["source"]).parent.name
        assert labels[line["row"]] == line["label"]
    # One picture by hand, through torchvision's transform as MoCo-v3 publishes it.
    line = lines[7]
    published = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(64)])
    x_HWC = np.asarray(published(Image.open(line["source"]).convert("RGB")))
    own = encode(load_encoder(EncoderSpec("mocov3", str(mocov3)), "cpu"), x_HWC[None], "cpu", "float32")[0].numpy()
    found = unprojected(tmp_path / "out", "mocov3", base, line["row"])
    assert np.linalg.norm(found - own) / np.linalg.norm(own) < 5e-3  # a grey level, and float16


def test_imagenets_originals_keep_theirs_through_clip(real_data: Path, tmp_path: Path, clip: tuple[Path, Path]) -> None:
    shard = real_data / "imagenet-originals" / "train-000000.tar"
    lines, _ = run(f"wds:{shard}", tmp_path / "out", "clip", clip[0], limit=8)
    with tarfile.open(shard) as archive:
        for line in lines:
            member = archive.extractfile(f"{line['key']}.cls")
            assert member is not None and int(member.read()) == line["label"]


def test_cocos_pictures_keep_their_captions_through_clip(
    real_data: Path, tmp_path: Path, clip: tuple[Path, Path]
) -> None:
    out = tmp_path / "out"
    lines, _ = run(
        f"coco:{real_data / 'coco'}", out, "clip", clip[0],
        limit=5, split="val", basis="own", text="clip", text_weights=str(clip[1]),
    )  # fmt: skip
    document = json.loads((real_data / "coco" / "annotations" / "captions_val2017.json").read_text())
    name_of = {image["id"]: image["file_name"] for image in document["images"]}
    published: dict[str, list[str]] = {}
    for annotation in document["annotations"]:
        published.setdefault(Path(name_of[annotation["image_id"]]).stem, []).append(annotation["caption"])
    offsets = zarr.open_array(str(out / "text" / "offsets.zarr"), mode="r")[:]
    text = zarr.open_array(str(out / "text" / "77x16.zarr"), mode="r")
    assert text.shape == (1 + sum(len(line["captions"]) for line in lines), 77, 16)
    encoder = load_text_encoder(TextSpec("clip", str(clip[1])), "cpu")
    for line in lines:
        own = published[Path(line["source"]).stem]
        assert sorted(caption.split() for caption in line["captions"]) == sorted(caption.split() for caption in own)
        first, last = offsets[line["row"]], offsets[line["row"] + 1]
        np.testing.assert_allclose(text[first:last], encoder.encode(line["captions"]), atol=1e-2)
