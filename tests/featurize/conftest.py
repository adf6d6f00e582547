"""Small real inputs: picture files, shards, and a ViT with random weights in timm's layout."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import webdataset
from PIL import Image
from safetensors.torch import save_file

MODEL = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3}


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def featurize(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Calls the command line in this process: `featurize("info", path)`."""
    from featurize.cli.main import main

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["featurize", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as error:
            code = int(error.code or 0)
        out, err = capfd.readouterr()
        return Outcome(code, out, err)

    return call


@pytest.fixture(scope="session", autouse=True)
def no_network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test fetches weights from the world, or finds those of the machine it runs on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEATURIZE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
        yield


def random_picture(index: int, width: int = 40, height: int = 36) -> Image.Image:
    """A smooth random picture: a few coloured blobs, different for each index."""
    random = np.random.default_rng(index)
    coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 JPEG and PNG files in three class folders."""
    root = tmp_path_factory.mktemp("pictures")
    for index in range(60):
        folder = root / f"class-{index % 3}"
        folder.mkdir(exist_ok=True)
        picture = random_picture(index, 30 + index % 20, 30 + index % 7)
        picture.save(folder / (f"{index:03d}.png" if index % 2 else f"{index:03d}.jpg"))
    return root


@pytest.fixture(scope="session")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A webdataset shard of ten pictures with labels and captions."""
    path = tmp_path_factory.mktemp("shards") / "train-000000.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for index in range(10):
            buffer = io.BytesIO()
            random_picture(index).save(buffer, format="JPEG")
            writer.write(
                {
                    "__key__": f"{index:04d}",
                    "jpg": buffer.getvalue(),
                    "cls": index % 2,
                    "json": {"captions": [f"picture {index}"]},
                }
            )
    return path


@pytest.fixture(scope="session")
def vit_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a small ViT (4x4 grid, 48 channels) with the JSON that describes them."""
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=7, **MODEL_ARGS)
    save_file(model.state_dict(), path)
    described = {"model": MODEL, "model_args": MODEL_ARGS, "mean": [0.5] * 3, "std": [0.5] * 3}
    path.with_suffix(".json").write_text(json.dumps(described))
    return path


@pytest.fixture(scope="session")
def extraction(tmp_path_factory: pytest.TempPathFactory, picture_folder: Path, vit_weights: Path) -> Path:
    """A sealed store root of the 60 pictures, two views, levels 2x2x8 and 1x1x16. Tests must not write to it."""
    from featurize.extraction.extract import extract
    from featurize.recipe import read_request

    root = tmp_path_factory.mktemp("stores") / "train"
    extract(read_request(None, options(picture_folder, vit_weights, root), "2x2x8,1x1x16"), workers=0, scheduler=None)
    return root


def options(pictures: Path, weights: Path, out: Path, **more: object) -> dict[str, object]:
    """Options of an extraction of a folder with the small ViT."""
    source, encoder = f"folder:{pictures}", f"timm:{MODEL}"
    return {
        "source": source,
        "encoder": encoder,
        "weights": str(weights),
        "out": str(out),
        "views": 2,
        "z0": "pixels:16",
        **more,
    }


def as_words(request: dict[str, object]) -> list[object]:
    """Those options as words of the command line, with the levels of the fixture `extraction` and no worker."""
    names = ("encoder", "weights", "out", "views", "z0")
    words = [word for name in names for word in (f"--{name}", request[name])]
    return [*words, "--levels", "2x2x8,1x1x16", "--workers", 0]


def chunks(root: Path) -> dict[str, bytes]:
    """Every chunk and seal of a store root."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and ("/c/" in str(path) or path.name.endswith(".seal.json"))
    }
