"""Decoding JPEG: featurize's way (simplejpeg in strict mode, which also tells what libjpeg warns of) beside Pillow alone.

python -m benchmarks.decode --out build/decode.md
python -m benchmarks.decode --source wds:shards/000000.tar
"""

from __future__ import annotations

import io
from pathlib import Path

import click
import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from benchmarks.photos import jpeg
from benchmarks.side_by_side import out_option, ratio, report, rounds_option, table, take_turns
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
        measured = take_turns(
            {
                "Pillow": lambda _, files=files: [_pillow(data) for data in files],
                "featurize": lambda _, files=files: [decode(data) for data in files],
                "simplejpeg alone, to an array": lambda _, files=files: [
                    simplejpeg.decode_jpeg(data) for data in files
                ],
            },
            rounds,
        )
        for contender, took in measured.items():
            each = 1000 * took.cpu / len(files)
            lines.append([name, contender, f"{each:.2f}", ratio(took.cpu, measured["Pillow"].cpu)])
    body = table(["images", "decoder", "ms of a core each", "of Pillow's time"], lines)
    report(
        "Decoding JPEG", f"{body}\n\nEvery decoded image is equal to the byte.", ("pillow", "simplejpeg", "numpy"), out
    )


def _pillow(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    ImageOps.exif_transpose(image, in_place=True)
    return image.convert("RGB")


if __name__ == "__main__":
    main()
