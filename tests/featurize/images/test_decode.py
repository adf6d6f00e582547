"""Decoding any picture to upright RGB, and the one crop."""

from __future__ import annotations

import csv
import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import functional

from featurize.extraction.scan import make_ledger
from featurize.images.crop import SQUARE, InputSpec, crop, square_box
from featurize.images.decode import decode, examine
from featurize.images.reasons import BadImage
from featurize.sources import list_images, read
from featurize.store.layout import ledger_path
from tests.featurize.extraction.test_scan import here


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


def test_every_flipped_bit_in_a_png_is_refused_but_those_after_its_pixels() -> None:
    """Its checksums are compared; those 8 bytes of the end mark that nobody reads, its length and its checksum, harm nothing."""
    small = COLOUR.resize((6, 5))
    data = encoded(small, "PNG")
    passed = set()
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            pixels = decode(bytes(flipped))
        except BadImage:
            continue
        assert np.array_equal(np.asarray(pixels), np.asarray(small))
        passed.add(bit // 8 - len(data))
    assert passed == {-12, -11, -10, -9, -4, -3, -2, -1}


@pytest.mark.parametrize("data", [b"", b"no picture", encoded(COLOUR, "JPEG")[:700], encoded(COLOUR, "PNG")[:-30]])
def test_damaged_files_are_refused_with_a_reason(data: bytes) -> None:
    with pytest.raises(BadImage) as refused:
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
        np.abs(crop(picture, SQUARE, InputSpec(size, "bicubic")).astype(int) - np.asarray(expected).astype(int)).max()
        <= 1
    )


def png_of(size: tuple[int, int], depth: int, colour: int, row: bytes) -> bytes:
    """A PNG file of equal rows, made by hand: Pillow writes no 16-bit colour, and a bomb should not burst here."""
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(b"\0" + row) for _ in range(size[1])) + packer.flush()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_a_channel_are_within_one_of_the_scaled_value(channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (40, channels)).astype(">u2")
    decoded = np.asarray(decode(png_of((40, 2), 16, 0 if channels == 1 else 2, values.tobytes())), float)
    exact = np.broadcast_to(values.astype(float) / 257, (40, 3))
    assert np.abs(decoded - exact).max() <= (0.5 if channels == 1 else 1.0)


def test_float_and_wide_integers_keep_their_range() -> None:
    ramp = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (8, 1))
    for scale in (1.0, 255.0):
        decoded = np.asarray(decode(encoded(Image.fromarray(ramp * scale), "TIFF")), float)[..., 0]
        assert np.abs(decoded - ramp * 255).max() <= 0.51
    wide = Image.fromarray((ramp * 65535).astype(np.int32))
    assert np.abs(np.asarray(decode(encoded(wide, "TIFF")), float)[..., 0] - ramp * 255).max() <= 0.51


def ycck(image: Image.Image) -> bytes:
    """A YCCK JPEG: of the CMYK picture's first three channels, YCbCr is stored, and Adobe's mark says so."""
    c, m, y, k = image.split()
    planes = Image.merge("RGB", (c, m, y)).convert("YCbCr").split()
    # Pillow writes CMYK upside down.
    data = encoded(
        Image.merge("CMYK", (*(ImageOps.invert(plane) for plane in planes), k)), "JPEG", quality=95, subsampling=0
    )
    mark = data.index(b"Adobe") + 11
    assert data[mark] == 0
    return data[:mark] + b"\2" + data[mark + 1 :]


def test_cmyk_and_ycck_are_the_same_colours() -> None:
    cmyk = COLOUR.convert("CMYK")
    cyan, magenta, yellow, black = cmyk.split()
    inked = Image.merge("CMYK", (cyan, magenta, yellow, black.point(lambda value: 40)))
    for image in (cmyk, inked):
        exact = np.asarray(image.convert("RGB"), float)
        for data in (encoded(image, "JPEG", quality=95, subsampling=0), ycck(image)):
            found = examine(data)
            decoded = found.image
            assert found.mode == "CMYK"
            assert np.abs(np.asarray(decoded, float) - exact).mean() < 3
            reference = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
            assert np.abs(np.asarray(decoded, float) - reference.permute(1, 2, 0).numpy()).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_exif_orientation_is_undone(kind: str) -> None:
    methods = [None, *(getattr(Image.Transpose, name) for name in (
        "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90",
    ))]  # fmt: skip
    options = {"quality": 100} if kind in ("JPEG", "WEBP") else {}
    for orientation, method in enumerate(methods, 1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        decoded = decode(encoded(COLOUR, kind, exif=exif, **options))
        expected = COLOUR.transpose(method) if method is not None else COLOUR
        assert decoded.size == expected.size
        assert np.abs(np.asarray(decoded, float) - np.asarray(expected, float)).mean() < 6


def test_damaged_exif_says_nothing_of_the_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(COLOUR, "JPEG", exif=exif.tobytes()[:-9], quality=95)
    assert decode(data).size == COLOUR.size


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_counts(kind: str) -> None:
    frames = [COLOUR, COLOUR.transpose(Image.Transpose.ROTATE_180), Image.new("RGB", COLOUR.size)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=40, lossless=True)
    assert np.abs(np.asarray(decode(data), float) - np.asarray(COLOUR, float)).mean() < 6


def test_progressive_is_baseline() -> None:
    plain, progressive = (decode(encoded(COLOUR, "JPEG", quality=90, progressive=flag)) for flag in (False, True))
    assert np.array_equal(np.asarray(plain), np.asarray(progressive))


def test_transparency_is_dropped_as_torchvisions_loader_does() -> None:
    clear = COLOUR.copy()
    clear.putalpha(Image.new("L", COLOUR.size, 0))
    assert np.array_equal(np.asarray(decode(encoded(clear, "PNG"))), np.asarray(COLOUR))


def test_formats_that_run_programs_are_no_pictures() -> None:
    with pytest.raises(BadImage, match="no picture of a known format"):
        decode(encoded(COLOUR, "EPS"))


def test_reasons_are_the_same_in_every_run() -> None:
    reasons = set()
    for _ in range(3):
        with pytest.raises(BadImage) as refused:
            decode(b"version https://git-lfs.github.com/spec/v1")
        reasons.add(str(refused.value))
    assert len(reasons) == 1
    assert "it starts with b'version '" in reasons.pop()


def test_the_odd_files_of_imagenet(tmp_path: Path) -> None:
    """22 of ImageNet's JPEGs are CMYK, and n02105855_2933.JPEG is a PNG; none of them may be lost."""
    folder = tmp_path / "train" / "n02105855"
    folder.mkdir(parents=True)
    for number in range(22):
        picture = COLOUR.transpose(Image.Transpose.ROTATE_180) if number % 2 else COLOUR
        data = ycck(picture.convert("CMYK")) if number < 11 else encoded(picture.convert("CMYK"), "JPEG", quality=95)
        (folder / f"n02105855_{number:02d}.JPEG").write_bytes(data)
    (folder / "n02105855_2933.JPEG").write_bytes(encoded(COLOUR, "PNG"))
    (folder / "n02105855_99.JPEG").write_bytes(encoded(GREY, "JPEG", quality=95))
    listing = list_images(f"imagenet:{tmp_path}", "train", None)
    modes = {}
    for picture in listing.images:
        found = examine(read(picture))
        decoded, modes[picture.key] = found.image, found.mode
        number = int(picture.key.rpartition("_")[2].partition(".")[0])
        wanted = GREY.convert("RGB") if number == 99 else COLOUR
        if number < 22 and number % 2:
            wanted = wanted.transpose(Image.Transpose.ROTATE_180)
        assert np.abs(np.asarray(decoded, float) - np.asarray(wanted, float)).mean() < 6, picture.key
    assert sorted(modes.values()) == ["CMYK"] * 22 + ["L", "RGB"]


PEAK = """
import json, resource, sys
from featurize.images.decode import decode
from featurize.images.reasons import BadImage
from featurize.sources import list_images, read
ends = {}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for picture in list_images(sys.argv[1], "train", None).images:
    try:
        ends[picture.key] = decode(read(picture)).size
    except BadImage as error:
        ends[picture.key] = str(error)
print(json.dumps([ends, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""


def decode_all(source: str) -> tuple[dict[str, list[int] | str], int]:
    """How each picture of a source ends, size or reason, and the megabytes that it took at the peak of a process of its own."""
    done = subprocess.run([sys.executable, "-c", PEAK, source], capture_output=True, text=True, check=True)
    ends, kilobytes = json.loads(done.stdout)
    return ends, kilobytes // 1024


def test_a_bomb_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    COLOUR.save(folder / "good.png")
    # As RGB the first would take 400 MB, and Pillow itself lets it pass; the second 30 GB.
    (folder / "large.png").write_bytes(png_of((20_000, 5_000), 1, 0, b"\xaa" * 2_500))
    (folder / "huge.png").write_bytes(png_of((100_000, 100_000), 8, 2, b"")[:2_000])
    ends, peak = decode_all(f"folder:{folder}")
    assert ends["large.png"] == "20000 x 5000 pixels are too many, the limit is 89 million"
    assert ends["huge.png"] == "too many pixels, the limit is 89 million"
    assert ends["good.png"] == list(COLOUR.size)
    assert peak < 150


# What torchvision's decoders leave undone: the orientation of a WebP.
TURNED = {"hopper_orientation_6.webp": lambda picture: np.rot90(picture, -1)}


def test_public_decoder_suites_end_as_their_manifest_says(real_data: Path, tmp_path: Path) -> None:
    """Every file in one run, with memory bounded; and what is decoded has the colours that torchvision's decoders give."""
    with (real_data / "broken" / "MANIFEST.tsv").open() as file:
        expected = {line["path"]: line["expect"] for line in csv.DictReader(file, delimiter="\t")}
    source = f"folder:{real_data}/broken"
    ends, peak = decode_all(source)
    assert peak < 200
    make_ledger(tmp_path, source, list_images(source, "train", None), SQUARE, "100%", here)
    lines = {line["key"]: line for line in pq.read_table(ledger_path(tmp_path)).to_pylist()}
    assert lines.keys() == expected.keys() == ends.keys()
    compared = 0
    for path, line in lines.items():
        outcome = "decode" if line["row"] is not None else "reject"
        assert expected[path] in (outcome, "either"), path
        assert ends[path] == (line["reason"] if outcome == "reject" else [line["width"], line["height"]])
        if outcome == "reject":
            continue
        data = (real_data / "broken" / path).read_bytes()
        decoded = np.asarray(decode(data), float)
        assert decoded.shape == (line["height"], line["width"], 3)
        try:
            reference = decode_image(
                torch.frombuffer(bytearray(data), dtype=torch.uint8),
                mode=ImageReadMode.RGB,
                apply_exif_orientation=True,
            )
        except RuntimeError:  # AVIF, ICO, TIFF and animated WebP are beyond it
            continue
        first = (reference[0] if reference.ndim == 4 else reference).permute(1, 2, 0)
        scaled = first.numpy().astype(float) / (257 if first.dtype == torch.uint16 else 1)
        scaled = TURNED.get(Path(path).name, lambda picture: picture)(scaled)
        with Image.open(io.BytesIO(data)) as image:
            seen = (
                np.asarray(ImageOps.exif_transpose(image).convert("RGBA"))[..., 3] > 0
            )  # what is clear has any colour
        assert np.abs(decoded - scaled)[seen].max(initial=0) <= 1, path
        compared += 1
    assert compared >= 35


def test_a_scaled_jpeg_is_the_whole_one_made_smaller_and_its_size_and_damage_are_told() -> None:
    """Four to one eighths, whatever is still large enough; the sizes that the ledger gets are the file's, upright."""
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    file, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turned by 90 degrees
    Image.fromarray(coarse).resize((801, 603), Image.Resampling.BICUBIC).save(file, "JPEG", quality=92, exif=exif)
    data = file.getvalue()
    sizes = {least: examine(data, least=least).image.size for least in (0, 303, 302, 224, 151, 75)}
    assert sizes == {0: (603, 801), 303: (603, 801), 302: (302, 401), 224: (227, 301), 151: (151, 201), 75: (76, 101)}
    assert {examine(data, least=least).size for least in sizes} == {(603, 801)}
    whole, half = (decode(data, least=least).resize((150, 200), Image.Resampling.BOX) for least in (0, 224))
    difference = np.abs(np.asarray(whole, dtype=int) - np.asarray(half, dtype=int))
    assert 0 < difference.mean() < 2
    assert "libjpeg warns" in examine(data[:4000] + bytes(200) + data[4200:], least=224).warning
    png = io.BytesIO()
    Image.fromarray(coarse).resize((800, 600)).save(png, "PNG")
    assert decode(png.getvalue(), least=20).size == (800, 600)
