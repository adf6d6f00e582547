"""Decoding any picture to upright RGB, and the one crop."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional

from featurize.pictures import BadPicture, crop, decode, square_box


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


GREY = Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (48, 1)))
COLOUR = Image.merge("RGB", [GREY, GREY.transpose(Image.Transpose.FLIP_LEFT_RIGHT), Image.new("L", GREY.size, 90)])


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (COLOUR, "PNG"),
        (COLOUR.quantize(128), "PNG"),
        (COLOUR.convert("RGBA"), "PNG"),
        (COLOUR.convert("CMYK"), "JPEG"),
        (GREY, "JPEG"),
    ],
)
def test_every_mode_becomes_rgb_of_like_colours(image: Image.Image, kind: str) -> None:
    decoded = decode(encoded(image, kind))
    wanted = GREY.convert("RGB") if image is GREY else COLOUR
    assert decoded.mode == "RGB"
    assert np.abs(np.asarray(decoded, float) - np.asarray(wanted, float)).mean() < 12


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    sixteen = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)
    assert np.array_equal(np.asarray(decode(encoded(sixteen, "PNG")))[..., 0], np.asarray(GREY))


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    turned = decode(encoded(COLOUR, "JPEG", exif=exif, quality=95))
    assert turned.size == COLOUR.size[::-1]
    expected = np.asarray(COLOUR.transpose(Image.Transpose.ROTATE_270), float)
    assert np.abs(np.asarray(turned, float) - expected).mean() < 6


def test_a_flipped_byte_in_a_png_is_refused() -> None:
    data = bytearray(encoded(COLOUR, "PNG"))
    data[len(data) // 2] ^= 1
    with pytest.raises(BadPicture):
        decode(bytes(data))


@pytest.mark.parametrize("data", [b"", b"no picture", encoded(COLOUR, "JPEG")[:700], encoded(COLOUR, "PNG")[:-30]])
def test_damaged_files_are_refused_with_a_reason(data: bytes) -> None:
    with pytest.raises(BadPicture) as refused:
        decode(data)
    assert str(refused.value)


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_the_box_is_a_centred_square_within_the_picture(width: int, height: int) -> None:
    left, upper, right, lower = square_box(width, height)
    assert right - left == lower - upper == min(width, height)
    assert 0 <= left <= width - right + 1
    assert 0 <= upper <= height - lower + 1


@pytest.mark.parametrize("size", [16, 48, 100])
def test_the_crop_is_torchvisions(size: int) -> None:
    picture = COLOUR.resize((90, 70))
    expected = functional.resize(
        functional.center_crop(picture, [70, 70]), [size, size], functional.InterpolationMode.BICUBIC
    )
    assert (
        np.abs(crop(picture, square_box(90, 70), size, "bicubic").astype(int) - np.asarray(expected).astype(int)).max()
        <= 1
    )


def test_public_decoder_suites_end_as_their_manifest_says(real_data: Path) -> None:
    wrong = []
    with (real_data / "broken" / "MANIFEST.tsv").open() as file:
        for line in csv.DictReader(file, delimiter="\t"):
            try:
                decode((real_data / "broken" / line["path"]).read_bytes())
                outcome = "decode"
            except BadPicture:
                outcome = "reject"
            if line["expect"] not in (outcome, "either"):
                wrong.append((line["path"], line["expect"]))
    assert not wrong
