"""One crop a root: the published evaluation transforms to a grey level, and a bright dot in the same cell of every map."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from featurize.codecs import load_codec, parse_codec
from featurize.encoders import Encoder, EncoderSpec, encode, kinds, load_encoder
from featurize.images.crop import CropRule, crop
from tests.featurize.layouts import clip_state, described, moco_file, moco_state, torchscript_clip

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
SIZES = [(500, 375), (333, 500), (257, 231), (224, 224), (256, 256), (97, 411), (389, 1021), (50, 49)]
PUBLISHED = [
    pytest.param("mocov3", 256, 224, "bilinear", id="mocov3"),  # moco-v3 main_lincls.py
    pytest.param("dino", 256, 224, "bicubic", id="dino"),  # dino eval_knn.py
    pytest.param("clip", 224, 224, "bicubic", id="clip"),  # CLIP clip.py _transform
]


def photo(width: int, height: int, low: int, high: int) -> Image.Image:
    """Noise over large shapes: edges of every strength, between two grey levels."""
    random = np.random.default_rng(width * height)
    coarse = random.integers(low, high + 1, (5, 7, 3), dtype=np.uint8)
    shapes = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)).astype(int)
    return Image.fromarray(np.clip(shapes + random.integers(-40, 41, shapes.shape), low, high).astype(np.uint8))


def across_then_down(picture: Image.Image, resize: int, centre: int, interpolation: str) -> Image.Image:
    """torchvision's Resize and CenterCrop with Pillow's order of old: each pass by itself."""
    width, height = picture.size
    across, down = int(resize * width / min(picture.size)), int(resize * height / min(picture.size))
    resized = picture.resize((across, height), FILTERS[interpolation]).resize((across, down), FILTERS[interpolation])
    return transforms.CenterCrop(centre)(resized)


@pytest.mark.parametrize(("name", "resize", "centre", "interpolation"), PUBLISHED)
@pytest.mark.parametrize("size", SIZES)
def test_official_is_torchvisions_resize_and_centre_crop(
    name: str, resize: int, centre: int, interpolation: str, size: tuple[int, int]
) -> None:
    known = kinds()[name].variants[""]
    assert (known.resize, known.input_size, known.interpolation) == (resize, centre, interpolation)
    box = CropRule(resize, centre).box(*size)
    # Where no overshoot is clipped between the passes their order is free, so any Pillow's torchvision agrees.
    picture = photo(*size, 70, 185)
    mode = InterpolationMode(interpolation)
    published = transforms.Compose([transforms.Resize(resize, interpolation=mode), transforms.CenterCrop(centre)])
    expected = np.asarray(published(picture)).astype(int)
    assert np.abs(crop(picture, box, centre, interpolation) - expected).max() <= 1
    # Where it is, the Pillow of the encoders' day decides.
    picture = photo(*size, 0, 255)
    expected = np.asarray(across_then_down(picture, resize, centre, interpolation)).astype(int)
    assert np.abs(crop(picture, box, centre, interpolation) - expected).max() <= 1


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000))
def test_the_official_box_lies_within_the_picture(width: int, height: int) -> None:
    left, upper, right, lower = CropRule(256, 224).box(width, height)
    assert 0 <= left < right <= width
    assert 0 <= upper < lower <= height
    # A 256th of the short side is a pixel; the corner is rounded to one, the long side's length to less.
    pixel = min(width, height) / 256
    assert abs((left + right) / 2 - width / 2) <= pixel
    assert abs((upper + lower) / 2 - height / 2) <= pixel
    assert abs((right - left) - 224 * pixel) <= pixel


def _random_encoders(folder: Path) -> dict[str, Encoder]:
    moco = moco_file(folder / "moco.pth.tar", moco_state(64, 2, 4), img_size=64, embed_dim=64, depth=2, num_heads=4)
    archive = torchscript_clip(folder / "clip.pt", clip_state(64, 2, 16, 4, 24, (8, 1, 77)))
    described(archive, img_size=64, width=64, layers=2, heads=2, embed_dim=24)
    specs = {
        "tiny": EncoderSpec("tiny"),
        "mocov3": EncoderSpec("mocov3", str(moco)),
        "clip": EncoderSpec("clip", str(archive)),
        "vae": EncoderSpec("vae", "tiny", '{"img_size": 32}'),
    }
    return {name: load_encoder(spec, "cpu") for name, spec in specs.items()}


Encode = Callable[[np.ndarray], np.ndarray]


def brightest_place(encode_pictures: Encode, pictures: list[np.ndarray]) -> tuple[float, float]:
    """The middle of the cell that differs most between two pictures, in sides of the map: (across, down)."""
    first, second = encode_pictures(np.ascontiguousarray(np.stack(pictures)))
    change_HW = np.linalg.norm(second - first, axis=-1)
    row, column = np.unravel_index(change_HW.argmax(), change_HW.shape)
    return (int(column) + 0.5) / change_HW.shape[1], (int(row) + 0.5) / change_HW.shape[0]


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int, str, Encode, float]]:
    """(name, input size, interpolation, pictures to maps, how far off the found place may be) of encoders and codecs."""
    found = []
    for name, encoder in _random_encoders(tmp_path_factory.mktemp("encoders")).items():
        forward: Encode = lambda x, encoder=encoder: encode(encoder, x, "cpu", "float32").numpy()  # noqa: E731
        # The VAE's cells see each other: the dot may be strongest in the next one.
        reach = 1.5 if name == "vae" else 0.5
        found.append((name, encoder.input_size, encoder.interpolation, forward, reach / encoder.grid[0]))
    for name, weights, reach in (("vae:32", "tiny", 1.5), ("pixels:16", None, 0.5)):
        codec = load_codec(parse_codec(name, weights, None))
        found.append((name, codec.size, codec.interpolation, codec.encode, reach / codec.latent_shape[0]))
    return found


@pytest.mark.parametrize("rule", [CropRule(), CropRule(256, 224)], ids=str)
@pytest.mark.parametrize(("across", "down"), [(2.5 / 16, 5.5 / 16), (9.5 / 16, 13.5 / 16), (14.5 / 16, 2.5 / 16)])
def test_a_bright_dot_is_in_the_same_place_of_every_map(
    maps: list[tuple[str, int, str, Encode, float]], rule: CropRule, across: float, down: float
) -> None:
    width, height = 301, 173
    box = left, upper, right, lower = rule.box(width, height)
    dark, dotted = (np.full((height, width, 3), 60, np.uint8) for _ in range(2))
    x, y = left + across * (right - left), upper + down * (lower - upper)
    dotted[round(y - 3) : round(y + 3), round(x - 3) : round(x + 3)] = 255
    for name, size, interpolation, forward, reach in maps:
        crops = [crop(Image.fromarray(picture), box, size, interpolation) for picture in (dark, dotted)]
        found = brightest_place(forward, crops)
        assert abs(found[0] - across) <= reach + 1e-9 and abs(found[1] - down) <= reach + 1e-9, name
        found = brightest_place(forward, [picture[:, ::-1] for picture in crops])
        assert abs(found[0] - (1 - across)) <= reach + 1e-9 and abs(found[1] - down) <= reach + 1e-9, name


def test_a_root_has_one_crop(featurize, picture_folder: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    moco = moco_file(tmp_path / "m.pth.tar", moco_state(32, 1, 2), img_size=32, embed_dim=32, depth=1, num_heads=2)
    asked = ["extract", f"folder:{picture_folder}", "--out", tmp_path / "out", "--z0", "pixels:8", "--limit", 6]
    asked += ["--levels", "1x1x4", "--workers", 0]
    with_moco = [*asked, "--encoder", "mocov3", "--weights", moco, "--crop", "official"]
    outcome = featurize(*with_moco)
    assert outcome.code == 0, outcome.err
    table = pq.read_table(tmp_path / "out" / "rows.parquet")
    assert table.schema.metadata[b"crop"] == b"resize 256 centre 32"
    for line in table.to_pylist():
        np.testing.assert_allclose(line["box"], CropRule(256, 32).box(line["width"], line["height"]))
    outcome = featurize(*with_moco[:-1], "square")
    assert outcome.code == 1
    assert "cropped by the rule 'resize 256 centre 32', not 'square'" in outcome.err
    outcome = featurize(*asked, "--encoder", "vae", "--weights", "tiny", "--crop", "official")
    assert outcome.code == 1 and "no published evaluation crop" in outcome.err
