"""Decoding JPEG: featurize's way (simplejpeg in strict mode, which also tells what libjpeg warns of) beside Pillow alone, and
scaled, with what that changes in an encoder's features.

python -m benchmarks.decode --out build/decode.md
python -m benchmarks.decode --source wds:shards/000000.tar
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps

from benchmarks.photos import jpeg
from benchmarks.side_by_side import Contender, out_option, ratio, report, rounds_option, table, take_turns
from featurize.encoders import EncoderSpec, encode, load_encoder
from featurize.images.crop import SQUARE, InputSpec, crop
from featurize.images.decode import decode
from featurize.sources import list_images, read

SIZES = ((224, 224), (500, 375), (1200, 900))
BATCH = 32


@click.command()
@click.option("--source", metavar="SOURCE", help="Decode these images instead of made ones of three sizes.")
@click.option("--pictures", default=64, show_default=True, help="Images a round.")
@click.option("--scaled", default=64, show_default=True, metavar="SIDE", help="Also by the decoder scaled:SIDE.")
@click.option("--encoder", default="tiny", show_default=True, help="Whose features are compared, whole and scaled.")
@rounds_option
@out_option
def main(source: str | None, pictures: int, scaled: int, encoder: str, rounds: int, out: Path | None) -> None:
    """Bytes to an upright RGB image, in one thread, all bytes in memory."""
    if source is None:
        sets = {f"{w}x{h}": [jpeg(index, (w, h)) for index in range(pictures)] for w, h in SIZES}
    else:
        images = list_images(source, "train", pictures).images
        sets = {source: [data for data in map(read, images) if data.startswith(b"\xff\xd8")]}
    lines, changes = [], []
    for name, files in sets.items():
        for data in files:  # what is compared must be equal
            np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(_pillow(data)))
        decoders = {
            "Pillow": _pillow,
            "featurize": decode,
            f"featurize, scaled:{scaled}": partial(decode, least=scaled),
            "simplejpeg alone, to an array": simplejpeg.decode_jpeg,
        }
        measured = take_turns({one: _all_of(files, decoder) for one, decoder in decoders.items()}, rounds)
        for contender, took in measured.items():
            each = 1000 * took.cpu / len(files)
            lines.append([name, contender, f"{each:.2f}", ratio(took.cpu, measured["Pillow"].cpu)])
        cosines = _cosines(files, encoder, scaled)
        changes.append([name, f"{cosines.mean():.5f}", f"{np.quantile(cosines, 0.01):.5f}", f"{cosines.min():.5f}"])
    body = table(["images", "decoder", "ms of a core each", "of Pillow's time"], lines)
    changed = table(["images", "cosine, mean", "of 1 % less than", "least"], changes)
    report(
        "Decoding JPEG",
        f"{body}\n\nEvery image that is decoded whole is equal to the byte. Tokens of {encoder}, whole and scaled:{scaled}:\n\n"
        f"{changed}",
        ("pillow", "simplejpeg", "numpy"),
        out,
    )


def _cosines(files: list[bytes], name: str, least: int) -> np.ndarray:
    """Of each token of the images' centred squares, decoded whole and scaled."""
    network = load_encoder(EncoderSpec(name), "cpu")
    spec = InputSpec(network.input_size, network.interpolation)
    cosines = []
    for start in range(0, len(files), BATCH):
        part = files[start : start + BATCH]
        whole, scaled = (
            encode(network, np.stack([crop(decode(data, least=side), SQUARE, spec) for data in part]), "cpu", "float32")
            for side in (0, least)
        )
        cosines.append(torch.cosine_similarity(whole, scaled, dim=-1).flatten())
    return torch.cat(cosines).numpy()


def _all_of(files: list[bytes], decoder: Callable[[bytes], object]) -> Contender:
    def run(turn: int) -> None:
        for data in files:
            decoder(data)

    return run


def _pillow(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    ImageOps.exif_transpose(image, in_place=True)
    return image.convert("RGB")


if __name__ == "__main__":
    main()
