"""What a GPU does to images once nvJPEG has decoded them, on a CPU: Pillow's pixels; and which files are left to it."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from featurize.errors import UserError
from featurize.images.crop import INTERPOLATIONS, SQUARE, CropRule, InputSpec, crop, cropped
from featurize.images.decode import decode, size_for_nvjpeg
from featurize.images.on_device import DeviceImage, decode_on_device, require_nvjpeg

RULES = [SQUARE, CropRule(256, 224), CropRule(256, 224, between_pixels=True), CropRule(232, 224, "bilinear")]
COARSE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8))
PHOTO = COARSE.resize((200, 150), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image = PHOTO, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize("size", [(500, 375), (333, 500), (64, 64), (1200, 901), (97, 41)])
def test_crops_on_a_device_are_pillows_to_the_byte(size: tuple[int, int]) -> None:
    """Of noise with many values at both ends, so that overshoot is clipped, by every rule and filter, up and down."""
    dice = np.random.default_rng(0)
    noise_HWC = dice.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    noise_HWC[dice.random(size[::-1]) < 0.3] = 255
    on_device = DeviceImage(torch.from_numpy(noise_HWC).permute(2, 0, 1))
    specs = [InputSpec(side, name) for side in (224, 32, 256) for name in INTERPOLATIONS]
    specs += [InputSpec(64, "bicubic", "lanczos"), InputSpec(32, "bicubic", "adm")]
    for rule in RULES:
        for spec in specs:
            found = cropped(on_device, rule, spec).x_CHW.permute(1, 2, 0)
            assert np.array_equal(found, crop(Image.fromarray(noise_HWC), rule, spec)), (rule, spec)


def test_only_whole_upright_baseline_jpegs_are_left_to_nvjpeg() -> None:
    turned, straight = Image.Exif(), Image.Exif()
    turned[ExifTags.Base.Orientation], straight[ExifTags.Base.Orientation] = 6, 1
    png = io.BytesIO()
    PHOTO.save(png, "PNG")
    sound = jpeg(icc_profile=b"a profile")
    for data in (
        sound,
        *(jpeg(subsampling=kind) for kind in (0, 1, 2)),
        jpeg(restart_marker_rows=1),
        jpeg(exif=straight),
    ):
        assert size_for_nvjpeg(data) == (200, 150)
    middle = len(sound) // 2
    others = {
        "progressive": jpeg(progressive=True),
        "grey": jpeg(PHOTO.convert("L")),
        "four inks": jpeg(PHOTO.convert("CMYK")),
        "RGB as it is": jpeg(keep_rgb=True),
        "turned": jpeg(exif=turned),
        "cut": sound[:-1000],
        "cut, then ended": sound[:300] + sound[-2:],
        "longer": sound + b"\0",
        "spliced": sound[:middle] + b"\xff\xd9" + sound[middle:],
        "another one within": sound[:middle] + sound + sound[middle:],
        "PNG": png.getvalue(),
        "empty": b"",
    }
    assert {name: size_for_nvjpeg(data) for name, data in others.items()} == dict.fromkeys(others)
    assert size_for_nvjpeg(sound, "srgb") is None


def test_what_is_left_to_nvjpeg_is_not_what_pillow_refuses() -> None:
    """Whatever byte is another, or bytes are lost: so the same images are refused with either decoder."""
    sound, chance, left = jpeg(), random.Random(0), 0
    for number in range(3000):
        data = bytearray(sound)
        place = chance.randrange(700 if number % 2 else len(data))  # most headers end there
        if number % 5:
            data[place] = chance.randrange(256)
        else:
            del data[place : place + chance.randint(1, 400)]
        if size_for_nvjpeg(bytes(data)):
            decode(bytes(data))
            left += 1
    assert left > 1000


def test_nvjpeg_without_a_gpu_is_one_sentence() -> None:
    with pytest.raises(UserError, match="decodes on an NVIDIA GPU, and there is none here; use --decoder pillow"):
        require_nvjpeg("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_nvjpegs_pixels_are_near_pillows() -> None:
    sound = jpeg(quality=95)
    images = decode_on_device([sound, np.frombuffer(sound[:-900] + sound[-2:], np.uint8).copy(), sound], "cuda:0")
    for image in (images[0], images[2]):
        assert image is not None
        difference = image.x_CHW.permute(1, 2, 0).cpu().numpy() - np.asarray(PHOTO, dtype=int)
        assert np.abs(difference).mean() < 3
