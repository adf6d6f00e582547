"""Decoding JPEG: featurize's way (simplejpeg in strict mode, which also tells what libjpeg warns of) beside Pillow alone.

python -m benchmarks.decode --out build/decode.md
python -m benchmarks.decode --source wds:shards/000000.tar
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from benchmarks.photos import jpeg
from benchmarks.side_by_side import Contender, out_option, ratio, report, rounds_option, table, take_turns
from featurize.images.decode import decode
from featurize.sources import list_images, read

SIZES = ((224, 224), (500, 375), (1200, 900))


@click.command()
@click.option("--source", metavar="SOURCE", help="Decode these images instead of made ones of three sizes.")
@click.option("--pictures", default=64, show_default=True, help="Images a round.")
@rounds_option
@out_option
def main(source: str | None, pictures: int, rounds: int, out: Path | None) -> None:
    """Bytes to an upright RGB image, in one thread, all bytes in memory."""
    if source is None:
        sets = {f"{w}x{h}": [jpeg(index, (w, h)) for index in range(pictures)] for w, h in SIZES}
    else:
        images = list_images(source, "train", pictures).images
        sets = {source: [data for data in map(read, images) if data.startswith(b"\xff\xd8")]}
    lines = []
    for name, files in sets.items():
        for data in files:  # what is compared must be equal
            np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(_pillow(data)))
        decoders = {"Pillow": _pillow, "featurize": decode, "simplejpeg alone, to an array": simplejpeg.decode_jpeg}
        measured = take_turns({one: _all_of(files, decoder) for one, decoder in decoders.items()}, rounds)
        for contender, took in measured.items():
            each = 1000 * took.cpu / len(files)
            lines.append([name, contender, f"{each:.2f}", ratio(took.cpu, measured["Pillow"].cpu)])
    body = table(["images", "decoder", "ms of a core each", "of Pillow's time"], lines)
    report(
        "Decoding JPEG", f"{body}\n\nEvery decoded image is equal to the byte.", ("pillow", "simplejpeg", "numpy"), out
    )


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
