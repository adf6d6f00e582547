"""Images and random weights for the benchmarks of extraction."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import numpy as np
import timm
import torch
import webdataset
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file

from featurize.checkpoints.autoencoder_kl import SD_CONFIG

ImageSize = tuple[int, int]
DISTINCT = 256  # images; after that they repeat, as making one takes longer than everything that is measured


def write_shards(folder: Path, count: int, size: ImageSize = (500, 375), shard: int = 64) -> list[Path]:
    """Webdataset shards of JPEGs as large as ImageNet's are on average, with as much detail as photos have."""
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(folder / "%06d.tar"), maxcount=shard, verbose=0) as shards:
        for index in range(count):
            shards.write({"__key__": f"{index:08d}", "jpg": jpeg(index % DISTINCT, size), "txt": f"picture {index}"})
    return sorted(folder.glob("*.tar"))


@cache
def jpeg(index: int, size: ImageSize) -> bytes:
    """Noise at every scale, like the 1/f spectrum of photos: about 60 kB at 500x375."""
    random = np.random.default_rng(index)
    image = np.zeros((size[1], size[0], 3), np.float32)
    for side in (4, 16, 64, 256):
        coarse = Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize(size)
        image += np.asarray(coarse, np.float32) / side**0.5
    image = 255 * (image - image.min()) / (image.max() - image.min())
    buffer = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def random_vae(folder: Path) -> Path:
    """Stable Diffusion's autoencoder with random weights, in diffusers' layout."""
    torch.manual_seed(0)
    AutoencoderKL.from_config(SD_CONFIG).save_pretrained(folder / "vae")
    return folder / "vae"


def source_or_shards(source: str | None, folder: Path, count: int) -> tuple[str, str]:
    """SOURCE and what its images are called in a table; by default `count` generated JPEGs below the folder."""
    if source is not None:
        return source, f"pictures of `{source}`"
    write_shards(folder / "shards", count)
    return f"wds:{folder / 'shards'}/*.tar", "generated JPEGs of 500x375"


def random_vit(folder: Path, model: str) -> Path:
    """A timm model's random weights as safetensors."""
    torch.manual_seed(0)
    path = folder / f"{model}.safetensors"
    save_file(timm.create_model(model, num_classes=0).state_dict(), path)
    return path
