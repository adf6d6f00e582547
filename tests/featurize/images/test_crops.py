"""One crop a root: the published evaluation transforms to the byte, and a bright dot in the same cell of every map."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from featurize.codecs import describe_codec, load_codec, parse_codec
from featurize.encoders import Encoder, EncoderSpec, encode, kinds, load_encoder
from featurize.errors import UserError
from featurize.execution.tasks import run_here
from featurize.extraction.scan import make_ledger
from featurize.images.crop import SQUARE, CropRule, InputSpec, crop, parse_rule
from featurize.sources import list_images
from featurize.store.layout import z0_path
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
    rule, spec = CropRule(resize, centre), InputSpec(centre, interpolation)
    # Today's Pillow takes the cheaper order of the two passes, which rounds elsewhere. Nothing is clipped between them here.
    picture = photo(*size, 70, 185)
    mode = InterpolationMode(interpolation)
    published = transforms.Compose([transforms.Resize(resize, interpolation=mode), transforms.CenterCrop(centre)])
    expected = np.asarray(published(picture)).astype(int)
    assert np.abs(crop(picture, rule, spec) - expected).max() <= 1
    # The Pillow of the encoders' day decides, to the byte.
    for shown in (picture, photo(*size, 0, 255)):
        expected = np.asarray(across_then_down(shown, resize, centre, interpolation))
        assert np.array_equal(crop(shown, rule, spec), expected)
        # That of featurize 0.1.0, whose stores are gone on with, was off by a grey level here and there.
        former = crop(shown, CropRule(resize, centre, between_pixels=True), spec)
        assert np.abs(former - expected.astype(int)).max() <= 1


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
    left, upper, right, lower = rule.box(width, height)
    dark, dotted = (np.full((height, width, 3), 60, np.uint8) for _ in range(2))
    x, y = left + across * (right - left), upper + down * (lower - upper)
    dotted[round(y - 3) : round(y + 3), round(x - 3) : round(x + 3)] = 255
    for name, size, interpolation, forward, reach in maps:
        crops = [crop(Image.fromarray(picture), rule, InputSpec(size, interpolation)) for picture in (dark, dotted)]
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
    assert table.schema.metadata[b"crop"] == b"Resize(256) CenterCrop(32)"
    for line in table.to_pylist():
        np.testing.assert_allclose(line["box"], CropRule(256, 32).box(line["width"], line["height"]))
    outcome = featurize(*with_moco[:-1], "square")
    assert outcome.code == 1
    assert "cropped by the rule 'Resize(256) CenterCrop(32)', not 'square'" in outcome.err
    outcome = featurize(*asked, "--encoder", "vae", "--weights", "tiny", "--crop", "official")
    assert outcome.code == 1 and "no published evaluation crop" in outcome.err


RULES = [SQUARE, CropRule(256, 224), CropRule(256, 256, "bicubic"), CropRule(256, 224, between_pixels=True)]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_rule_is_read_as_it_is_written(rule: CropRule) -> None:
    assert parse_rule(str(rule)) == rule
    assert len({str(one) for one in RULES}) == len(RULES)


def test_an_unknown_rule_is_a_sentence() -> None:
    with pytest.raises(UserError, match="The crop rule 'FiveCrop' is not known here; install the version"):
        parse_rule("FiveCrop(224)"[:8])


@pytest.mark.parametrize("size", SIZES)
def test_rcgs_official_crop_is_256_bicubic_then_224_by_interpolation(size: tuple[int, int], tmp_path: Path) -> None:
    """The way in of RCG's own code, with the network in between: Resize, CenterCrop, ToTensor, Normalize, interpolate."""
    network = {"img_size": 64, "embed_dim": 64, "depth": 1, "num_heads": 4, "mlp_dim": 16, "projection_dim": 8}
    weights = moco_file(tmp_path / "m.pth.tar", moco_state(64, 1, 4, 16, 8), **network)
    encoder = load_encoder(EncoderSpec("rcg", str(weights)), "cpu")
    rule = encoder.official_crop
    assert rule == CropRule(256, 256, "bicubic") and rule.side(encoder.input_size) == 256
    picture = photo(*size, 0, 255)
    found = crop(picture, rule, InputSpec(rule.side(encoder.input_size), encoder.interpolation))
    pixels = across_then_down(picture, 256, 256, "bicubic")
    assert np.array_equal(found, np.asarray(pixels))
    x_1CHW = transforms.Normalize(encoder.mean, encoder.std)(transforms.ToTensor()(pixels))[None]
    x_1CHW = torch.nn.functional.interpolate(x_1CHW, 64, mode="bicubic")
    expected = encoder.forward(x_1CHW)
    np.testing.assert_allclose(encode(encoder, found[None].copy(), "cpu", "float32"), expected, atol=1e-5)


def uvits_coco(picture: Image.Image, side: int) -> np.ndarray:
    pixels = np.asarray(picture)
    short = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - short) // 2, (pixels.shape[1] - short) // 2
    square = Image.fromarray(pixels[top : top + short, left : left + short])
    return np.asarray(square.resize((side, side), Image.Resampling.LANCZOS))


def adms(picture: Image.Image, side: int) -> np.ndarray:
    width, height = picture.size
    while min(width, height) >= 2 * side:
        width, height = width // 2, height // 2
        picture = picture.resize((width, height), Image.Resampling.BOX)
    factor = side / min(width, height)
    pixels = np.asarray(picture.resize((round(width * factor), round(height * factor)), Image.Resampling.BICUBIC))
    top, left = (len(pixels) - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[top : top + side, left : left + side]


@pytest.mark.parametrize(("name", "published"), [("lanczos", uvits_coco), ("adm", adms)])
@pytest.mark.parametrize("size", [*SIZES, (1000, 700), (640, 480)])
def test_z0_may_have_the_crop_of_uvits_latents(
    name: str, published: Callable[[Image.Image, int], np.ndarray], size: tuple[int, int]
) -> None:
    picture = photo(*size, 0, 255)
    for rule in (SQUARE, CropRule(256, 224)):
        assert np.array_equal(crop(picture, rule, InputSpec(128, "bicubic", name)), published(picture, 128))
    codec = describe_codec(parse_codec("pixels:128", None, None, crop=name))
    assert codec.input.own_crop == codec.identity["crop"] == name
    same = describe_codec(parse_codec("pixels:128", None, None))
    assert "crop" not in same.identity and same.identity["interpolation"] == "bicubic"


def test_the_crop_of_z0_is_part_of_its_identity(featurize, picture_folder: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    command = ["extract", f"folder:{picture_folder}", "--out", tmp_path / "out", "--z0", "pixels:16", "--limit", 6]
    command += ["--encoder", "pixels", "--levels", "1x1x4", "--workers", 0]
    outcome = featurize(*command, "--z0-crop", "lanczos")
    assert outcome.code == 0, outcome.err
    z0 = zarr.open_array(z0_path(tmp_path / "out", "pixels", (16, 16, 3)), mode="r")[:]
    paths = [path for path in sorted(picture_folder.rglob("*.*")) if path.is_file()][:6]
    for row, path in enumerate(paths):
        expected = uvits_coco(Image.open(path).convert("RGB"), 16) / 127.5 - 1
        np.testing.assert_allclose(z0[row, 0], expected, atol=1e-3)
    assert featurize("verify", tmp_path / "out", "--re-encode", 3).code == 0
    outcome = featurize(*command)
    assert outcome.code == 1 and "crop" in outcome.err


def test_a_root_of_the_former_official_crop_goes_on_with_it(
    featurize, picture_folder: Path, tmp_path: Path, caplog
) -> None:  # type: ignore[no-untyped-def]
    """Such a ledger says so; new arrays in it see what its old ones saw, and a sentence says that this is another crop."""
    moco = moco_file(tmp_path / "m.pth.tar", moco_state(32, 1, 2), img_size=32, embed_dim=32, depth=1, num_heads=2)
    root = tmp_path / "out"
    command = ["extract", f"folder:{picture_folder}", "--out", root, "--limit", 30, "--levels", "1x1x4", "--workers", 0]
    command += ["--encoder", "mocov3", "--weights", moco, "--crop", "official"]
    former = CropRule(256, 32, between_pixels=True)
    listing = list_images(f"folder:{picture_folder}", "train", 30)
    make_ledger(root, f"folder:{picture_folder}", listing, former, 0, run_here)
    outcome = featurize(*command, "--z0", "pixels:8")
    assert outcome.code == 0, outcome.err
    assert "was begun with the official crop of featurize 0.1.0" in caplog.text
    assert pq.read_schema(root / "rows.parquet").metadata[b"crop"] == str(former).encode()
    assert featurize(*command, "--z0", "pixels:16").code == 0
    assert featurize("verify", root, "--re-encode", 6).code == 0
    (root / "rows.parquet").unlink()
    assert featurize("repair", root).code == 0
    assert pq.read_schema(root / "rows.parquet").metadata[b"crop"] == str(former).encode()
