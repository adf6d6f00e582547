"""Inputs that once went wrong without a word, each with what should come of it, and others of its kind."""

from __future__ import annotations

import io
import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from featurize.images import jpeg
from featurize.images.decode import decode, examine
from featurize.images.reasons import BadImage
from featurize.sources import list_images, read
from featurize.store.layout import z0_path

RAMP = np.tile(np.linspace(0, 1, 64), (48, 1))
PHOTO = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)


@pytest.fixture
def faults(real_data: Path) -> Path:
    if not (real_data / "faults").is_dir():
        pytest.skip("there is no folder faults among the real data")
    return real_data / "faults"


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tiff(values_HW: np.ndarray, bits: int, photometric: int = 1, sample_format: int = 1) -> bytes:
    """A grey TIFF in one strip, little-endian, made by hand: Pillow writes none of 12 bits."""
    height, width = values_HW.shape
    if bits == 12:
        nibbles = values_HW.astype(np.uint16).reshape(height, -1, 2)
        first, second = nibbles[..., 0], nibbles[..., 1]
        strip = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8).tobytes()
    else:
        strip = values_HW.astype({16: "<u2", 32: "<i4"}[bits]).tobytes()
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height)]
    tags += [(279, len(strip)), (339, sample_format)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + struct.pack("<H", len(tags)) + entries + bytes(4)


def grey(data: bytes) -> np.ndarray:
    return np.asarray(decode(data), float)[..., 0]


def test_twelve_bits_run_to_4095(faults: Path) -> None:
    assert abs(grey((faults / "grey12.tif").read_bytes()).mean() - 110) < 1
    values = np.rint(RAMP * 4095)
    assert np.abs(grey(tiff(values, 12)) - values * 255 / 4095).max() <= 0.5


@pytest.mark.parametrize("white_is_zero", [False, True])
def test_sixteen_bits_of_a_tiff_run_to_65535_either_way(white_is_zero: bool) -> None:
    values = np.rint(RAMP * 65535)
    found = grey(tiff(values, 16, photometric=0 if white_is_zero else 1))
    assert np.abs(found - (1 - RAMP if white_is_zero else RAMP) * 255).max() <= 0.51


@pytest.mark.parametrize("largest", [255, 65535])
def test_whole_numbers_of_32_bits_are_8_or_16_bits(largest: int) -> None:
    assert np.abs(grey(tiff(np.rint(RAMP * largest), 32, sample_format=2)) - RAMP * 255).max() <= 0.51


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (RAMP.astype(np.float32) * 1.001, "floats from 0 to 1.001, whose range is not 0 to 1 or 0 to 255"),
        (RAMP.astype(np.float32) * 300, "floats from 0 to 300"),
        (RAMP.astype(np.float32) - 0.1, "floats from -0.1 to 0.9"),
        (np.where(RAMP > 0.5, np.inf, RAMP).astype(np.float32), "not all finite"),
        (np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32), "not all finite"),
        ((RAMP * 2**31 - 1).astype(np.int32), "32-bit whole numbers from -1 to 2.14748e\\+09"),
        ((RAMP * 70_000).astype(np.int32), "32-bit whole numbers from 0 to 70000"),
    ],
)
def test_other_ranges_are_refused(values: np.ndarray, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        decode(encoded(Image.fromarray(values), "TIFF"))


def test_the_files_that_were_black_or_white_are_refused(faults: Path) -> None:
    for name in ("float_overshoot.tif", "float_inf.tif", "int32.tif"):
        with pytest.raises(BadImage, match=r"grey picture .* (range is not|not all finite)"):
            decode((faults / name).read_bytes())


def test_sound_files_that_are_not_read_are_not_called_damaged(faults: Path) -> None:
    with pytest.raises(BadImage, match=r"^a JPEG of 12 bits a sample, which can't be read$"):
        decode((faults / "jpg12.jpg").read_bytes())
    for data, name in ((b"\0\0\0\x18ftypheic", "HEIF"), (b"\xff\x0a\0\0", "JPEG XL"), (b"8BPS\0\1", "Photoshop")):
        with pytest.raises(BadImage, match=f"{name}.*, which can't be read$"):
            decode(data + bytes(64))


def scans(data: bytes, times: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    last = data.rindex(jpeg.START_OF_SCAN)
    return data[:-2] + data[last:-2] * times + data[-2:]


def test_a_jpeg_of_many_scans_takes_bounded_time(faults: Path) -> None:
    start = time.process_time()
    with pytest.raises(BadImage, match=r"a JPEG of 30\d scans over 8000 x 8000 pixels takes too long to decode"):
        decode((faults / "scans300.jpg").read_bytes())
    assert time.process_time() - start < 1
    sound = encoded(Image.fromarray(PHOTO), "JPEG", progressive=True)
    many = scans(sound, 300)
    assert many.count(jpeg.START_OF_SCAN) > 300
    assert decode(many).size == (70, 90)  # small: all its scans take milliseconds


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP", b"tEXt"])
def test_a_png_with_megabytes_of_text_or_profile_is_sound(kind: bytes) -> None:
    plain = encoded(Image.fromarray(PHOTO), "PNG")
    long = b"a line of a log\n" * (2 << 16)
    packed = b"name\0\0" + zlib.compress(long)
    content = {b"tEXt": b"name\0" + long, b"iTXt": b"name\0\1\0\0\0" + zlib.compress(long)}.get(kind, packed)
    data = plain[:33] + chunk(kind, content) + plain[33:]  # after the header
    assert np.array_equal(np.asarray(decode(data)), PHOTO)


XMP = '<x:xmpmeta><rdf:RDF><rdf:Description tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF", "AVIF"])
def test_xmp_turns_where_exif_says_nothing(kind: str) -> None:
    image = Image.fromarray(np.kron(PHOTO[:6, :5], np.ones((16, 16, 1), np.uint8)))
    options = {"tiffinfo": {700: XMP.encode()}} if kind == "TIFF" else {"xmp": XMP.encode(), "quality": 95}
    turned = np.asarray(decode(encoded(image, kind, **options)), float)
    assert np.abs(turned - np.asarray(image.transpose(Image.Transpose.ROTATE_270), float)).mean() < 20
    exif = Image.Exif()
    exif[0x0112] = 3
    if kind == "TIFF":  # there Pillow writes one of the two
        exif[700] = XMP.encode()
        options = {}
    both = np.asarray(decode(encoded(image, kind, exif=exif, **options)), float)
    assert np.abs(both - np.asarray(image.transpose(Image.Transpose.ROTATE_180), float)).mean() < 20


def test_what_libjpeg_warns_of_is_told_and_what_it_does_not_see_is_not(faults: Path) -> None:
    found = {file.name: examine(file.read_bytes()).warning for file in (faults / "damaged_jpeg").glob("*.jpg")}
    assert found == {
        "intact.jpg": "",
        "lost_mid_4096.jpg": "libjpeg warns: Corrupt JPEG data: premature end of data segment",
        "noise_mid_64.jpg": "libjpeg warns: Corrupt JPEG data: 40 extraneous bytes before marker 0xd9",
        "zero_mid_512.jpg": "",  # still a valid code: no decoder can tell
    }


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_every_mode_of_a_damaged_jpeg_is_warned_of(mode: str) -> None:
    data = encoded(Image.fromarray(np.kron(PHOTO, np.ones((4, 4, 1), np.uint8))).convert(mode), "JPEG", quality=95)
    assert examine(data).warning == ""
    middle = data[: len(data) // 2] + data[len(data) // 2 + 4096 :]
    assert examine(middle).warning.startswith("libjpeg warns: ")


def test_simplejpegs_bytes_are_pillows(real_data: Path) -> None:
    """The broken files, whose decoding must not change by a byte, and photographs."""
    assert jpeg.equals_pillow()
    files = [*(real_data / "broken").rglob("*.jp*g"), *sorted((real_data / "coco").rglob("*.jpg"))[:40]]
    photos = list_images(f"wds:{real_data}/imagenet-originals/train-000000.tar", "train", 60).images
    compared = 0
    for name, data in [*((file, file.read_bytes()) for file in files), *((one.key, read(one)) for one in photos)]:
        try:
            with Image.open(io.BytesIO(data)) as image:
                if image.format not in ("JPEG", "MPO") or image.width * image.height > 50_000_000:
                    continue
                expected = np.asarray(image)
        except (OSError, Image.DecompressionBombError):
            with pytest.raises(BadImage):
                decode(data)
            continue
        with Image.open(io.BytesIO(data)) as image:
            found, _ = jpeg.load_jpeg(image, data)
            assert np.array_equal(np.asarray(found), expected), name
        compared += 1
    assert compared > 100


JPEGS = [
    encoded(Image.fromarray(PHOTO).convert(mode), "JPEG", quality=75, progressive=progressive)
    for mode in ("RGB", "L", "CMYK")
    for progressive in (False, True)
]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(JPEGS), st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=4), st.floats(0.3, 1)
)
def test_whatever_becomes_of_a_jpeg_pillow_decides(data: bytes, changes: list[tuple[float, int]], kept: float) -> None:
    """Bytes changed and a tail cut off: the very pixels that Pillow alone gives, or a reason where it gives none."""
    damaged = bytearray(data[: int(kept * len(data))])
    for place, value in changes:
        damaged[int(place * len(damaged))] = value
    file = bytes(damaged)
    try:
        with Image.open(io.BytesIO(file), formats=["JPEG"]) as image:
            image.load()
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception:
        with pytest.raises(BadImage, match=r"."):
            decode(file)
        return
    found = examine(file)
    assert np.array_equal(np.asarray(found.image), expected)
    if file == data:
        assert found.warning == ""


def test_another_libjpeg_leaves_the_pixels_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.fromarray(PHOTO), "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(data)))
    monkeypatch.setattr(jpeg, "equals_pillow", lambda: False)
    assert np.array_equal(np.asarray(decode(data)), expected)


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def swapped_profile() -> bytes:
    """A profile in which red and green change places, which only colour management can know."""
    swapped = bytearray(srgb_profile())
    count = struct.unpack(">I", swapped[128:132])[0]
    tags = {bytes(swapped[at : at + 4]): at for at in range(132, 132 + 12 * count, 12)}
    red, green = (slice(tags[tag] + 4, tags[tag] + 12) for tag in (b"rXYZ", b"gXYZ"))
    swapped[red], swapped[green] = swapped[green], swapped[red]
    return bytes(swapped)


def test_an_embedded_profile_is_converted_when_asked_for() -> None:
    image = Image.fromarray(np.full((8, 8, 3), (200, 60, 30), np.uint8))
    for kind, options in (
        ("PNG", {}),
        ("JPEG", {"quality": 100, "subsampling": 0}),
        ("TIFF", {}),
        ("WEBP", {"lossless": True}),
    ):
        data = encoded(image, kind, icc_profile=swapped_profile(), **options)
        assert np.abs(np.asarray(decode(data)).astype(int)[0, 0] - (200, 60, 30)).max() <= 2, kind
        assert np.abs(np.asarray(decode(data, "srgb")).astype(int)[0, 0] - (60, 200, 30)).max() <= 3, kind
    grey_image = image.convert("L")
    data = encoded(grey_image, "PNG", icc_profile=srgb_profile())
    assert np.abs(np.asarray(decode(data, "srgb")).astype(int) - np.asarray(decode(data)).astype(int)).max() <= 1


@pytest.mark.parametrize("profile", [b"no profile at all", srgb_profile()[:200]])
def test_a_profile_that_cannot_be_read_is_ignored(profile: bytes) -> None:
    data = encoded(Image.fromarray(PHOTO), "PNG", icc_profile=profile)
    assert np.array_equal(np.asarray(decode(data, "srgb")), PHOTO)


def test_a_profile_of_other_pixels_is_ignored() -> None:
    cmyk = Image.fromarray(PHOTO).convert("CMYK")
    data = encoded(cmyk, "JPEG", icc_profile=srgb_profile())
    assert np.array_equal(np.asarray(decode(data, "srgb")), np.asarray(decode(data)))


@pytest.fixture
def damaged_folder(tmp_path: Path) -> Path:
    """Five sound JPEGs and one whose middle is lost."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(6):
        pixels = np.random.default_rng(index).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        data = encoded(Image.fromarray(pixels), "JPEG", quality=95)
        half = len(data) // 2
        (folder / f"{index}.jpg").write_bytes(data[:half] + data[half + 2000 :] if index == 2 else data)
    return folder


def extraction(folder: Path, out: Path, *more: object) -> list[object]:
    command = ["extract", f"folder:{folder}", "--out", out, "--encoder", "pixels", "--levels", "1x1x1"]
    return [*command, "--z0", "pixels:8", "--workers", 0, *more]


def test_the_ledger_counts_damaged_jpegs_and_strict_refuses_them(
    featurize, damaged_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:  # type: ignore[no-untyped-def]
    loose, strict = tmp_path / "loose", tmp_path / "strict"
    assert featurize(*extraction(damaged_folder, loose)).code == 0
    assert "1 stored pictures are damaged JPEGs, of which libjpeg warns" in caplog.text
    lines = pq.read_table(loose / "rows.parquet").to_pylist()
    assert [line["row"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert [bool(line["reason"]) for line in lines] == [index == 2 for index in range(6)]
    assert lines[2]["reason"].startswith("libjpeg warns: ") and lines[2]["status"] == "ok"
    assert featurize("verify", loose).code == 0
    outcome = featurize(*extraction(damaged_folder, loose, "--strict"))
    assert outcome.code == 1 and "already holds 1 pictures that libjpeg warns of" in outcome.err

    assert featurize(*extraction(damaged_folder, strict, "--strict")).code == 0
    lines = pq.read_table(strict / "rows.parquet").to_pylist()
    assert [line["row"] for line in lines] == [0, 1, None, 2, 3, 4]
    assert lines[2]["status"] == "refused" and lines[2]["reason"].startswith("libjpeg warns: ")
    outcome = featurize(*extraction(damaged_folder, tmp_path / "none", "--strict", "--max-bad", 0))
    assert outcome.code == 1 and "libjpeg warns" in outcome.err
    (strict / "rows.parquet").unlink()
    assert featurize("repair", strict).code == 0
    assert pq.read_table(strict / "rows.parquet").to_pylist() == lines


def test_profiles_are_part_of_the_identity(featurize, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(6):
        image = Image.fromarray(np.random.default_rng(index).integers(60, 200, (16, 16, 3), dtype=np.uint8))
        image.save(folder / f"{index}.png", icc_profile=swapped_profile())
    ignored, converted = tmp_path / "ignored", tmp_path / "converted"
    assert featurize(*extraction(folder, ignored)).code == 0
    assert featurize(*extraction(folder, converted, "--icc", "srgb")).code == 0
    first, second = (zarr.open_array(z0_path(root, "pixels", (8, 8, 3)), mode="r") for root in (ignored, converted))
    assert np.abs(first[:][..., 0] - second[:][..., 1]).max() < 0.03  # red and green change places
    assert first.attrs["fingerprint"] != second.attrs["fingerprint"]
    assert "icc" not in first.attrs["provenance"] and second.attrs["provenance"]["icc"] == "srgb"
    assert featurize("verify", converted, "--re-encode", 4).code == 0
    outcome = featurize(*extraction(folder, converted))
    assert outcome.code == 1 and "icc" in outcome.err


def test_a_fifo_named_like_a_picture_does_not_hang(featurize, damaged_folder: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    os.mkfifo(damaged_folder / "7.jpg")
    (damaged_folder / "8.jpg").symlink_to("/dev/zero")
    outcome = featurize(*extraction(damaged_folder, tmp_path / "out"))
    assert outcome.code == 0, outcome.err
    lines = pq.read_table(tmp_path / "out" / "rows.parquet").to_pylist()
    assert [line["key"] for line in lines if line["row"] is not None] == [f"{index}.jpg" for index in range(6)]


@pytest.mark.parametrize("compression", ["tiff_deflate", "tiff_lzw"])
def test_a_damaged_tiff_is_one_reason_and_libtiff_is_silent(compression: str, capfd: pytest.CaptureFixture) -> None:
    file = io.BytesIO()  # a gradient: noise is stored as it is, where deflate has nothing that a flip could break
    Image.linear_gradient("L").save(file, "TIFF", compression=compression)
    data = bytearray(file.getvalue())
    data[200:260] = bytes(255 - byte for byte in data[200:260])
    with pytest.raises(BadImage, match=r"^its pixels can't be decoded \(the compressed data are damaged\)$"):
        decode(bytes(data))
    assert capfd.readouterr().err == ""
