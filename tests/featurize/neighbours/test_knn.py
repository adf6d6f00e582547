"""The sheet, its numbers and the overlap: for one encoder, for several, with raw features, with captions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featurize.neighbours.knn import Compared, Thumbnails, knn_viz
from featurize.store.ledger import read_ledger
from tests.featurize.conftest import MODEL, Outcome, options, random_picture

Command = Callable[..., Outcome]
ENCODER = f"timm:{MODEL}"


def test_a_sheet_a_matrix_and_the_numbers(extraction: Path, tmp_path: Path, featurize: Command) -> None:
    outcome = featurize(
        "knn-viz", "--stores", extraction, "--encoder", ENCODER, "--out", tmp_path / "knn.png", "--queries", 2, "--rows", "all"
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    spaces = ["mean of 4x4", "2x2x8", "1x1x16", "raw pixels"]
    assert all(space in outcome.out for space in [*spaces, "chance"])
    numbers = json.loads((tmp_path / "knn.json").read_text())
    assert list(numbers["label_agreement"]) == numbers["overlap"]["spaces"] == spaces
    assert numbers["rows"] == 60
    assert abs(numbers["chance"] - 19 / 59) < 1e-9
    matrix = np.array(numbers["overlap"]["matrix"])
    assert matrix.shape == (4, 4) and (np.diag(matrix) == 1).all()
    for name in ("knn.png", "knn-overlap.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 300
            assert np.asarray(picture.convert("L")).std() > 10


def test_an_inverted_file_says_its_recall(extraction: Path, tmp_path: Path, featurize: Command) -> None:
    outcome = featurize(
        "knn-viz", "--stores", extraction, "--encoder", ENCODER, "--out", tmp_path / "k.png", "--queries", 1, "--index", "ivf"
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "recall" in outcome.out
    assert json.loads((tmp_path / "k.json").read_text())["index"]["2x2x8"]["recall"] >= 0.95


def test_raw_features_share_more_neighbours_with_a_wide_basis(
    extraction: Path, vit_weights: Path, tmp_path: Path, featurize: Command
) -> None:
    arguments = ("knn-viz", "--stores", extraction, "--encoder", ENCODER, "--out", tmp_path / "k.png", "--raw")
    outcome = featurize(*arguments, "--weights", vit_weights)
    assert outcome.code == 0, outcome.err
    overlap = json.loads((tmp_path / "k.json").read_text())["overlap"]
    shared = dict(zip(overlap["spaces"], overlap["matrix"][0]))
    # The base store keeps all 48 channels: its mean differs from the raw one by the centring alone.
    assert shared["raw features"] == 1 and shared["mean of 4x4"] > shared["1x1x16"]
    other = tmp_path / "other.safetensors"
    shutil.copy(vit_weights, other)
    other.with_suffix(".json").write_text(vit_weights.with_suffix(".json").read_text().replace("0.5", "0.25"))
    refused = featurize(*arguments, "--weights", other)
    assert refused.code == 1 and "made with another" in refused.err and "mean" in refused.err


def test_two_encoders_stand_side_by_side(
    extraction: Path, picture_folder: Path, vit_weights: Path, tmp_path: Path, featurize: Command
) -> None:
    from featurize.extraction.extract import extract
    from featurize.recipe import read_request

    other = tmp_path / "other"
    wide = options(picture_folder, vit_weights, other) | {"encoder": "tiny", "weights": None}
    extract(read_request(None, wide, "2x2x8"), workers=0, scheduler=None)
    both = ("--stores", f"{extraction},{other}", "--encoder", f"{ENCODER},tiny")
    outcome = featurize("knn-viz", *both, "--out", tmp_path / "both.png", "--queries", 2)
    assert outcome.code == 0, outcome.err
    agreement = json.loads((tmp_path / "both.json").read_text())["label_agreement"]
    assert {f"{ENCODER} 2x2x8", "tiny 2x2x8", "raw pixels"} <= set(agreement)
    one = knn_viz([Compared(extraction, ENCODER)], tmp_path / "one.png", 2, 8, None, 0)
    assert one["label_agreement"]["2x2x8"] == agreement[f"{ENCODER} 2x2x8"]
    with Image.open(tmp_path / "both.png") as wide_sheet, Image.open(tmp_path / "one.png") as sheet:
        assert wide_sheet.width == 3 * sheet.width  # the two encoders and the raw pixels


def test_roots_and_encoders_of_one_name_are_told_apart(tmp_path: Path, featurize: Command) -> None:
    command = ("extract", "scenes:16", "--limit", 8, "--encoder", "pixels", "--z0", "pixels:8", "--workers", 0)
    roots = [tmp_path / name / "train" for name in ("one", "two")]
    for root, shape in zip(roots, ("2x2x4", "1x1x4")):
        assert featurize(*command, "--levels", shape, "--out", root).code == 0
    stores = ",".join(map(str, [*roots, roots[0]]))  # the last is no third one
    outcome = featurize(
        "knn-viz", "--stores", stores, "--encoder", "pixels", "--queries", 1, "--out", tmp_path / "k.png"
    )
    assert outcome.code == 0, outcome.err
    agreement = json.loads((tmp_path / "k.json").read_text())["label_agreement"]
    assert {"one/train pixels 2x2x4", "two/train pixels 1x1x4"} <= set(agreement)


def test_raw_features_are_those_of_the_stored_options(tmp_path: Path, featurize: Command) -> None:
    command = ("extract", "scenes:16", "--limit", 8, "--z0", "pixels:8", "--out", tmp_path, "--workers", 0)
    assert featurize(*command, "--encoder", "tiny", "--precision", "bfloat16", "--levels", "2x2x4").code == 0
    outcome = featurize("knn-viz", "--stores", tmp_path, "--raw", "--queries", 1, "--out", tmp_path / "k.png")
    assert outcome.code == 0, outcome.err
    assert "raw features" in json.loads((tmp_path / "k.json").read_text())["label_agreement"]


def test_images_that_are_gone_are_one_sentence(tmp_path: Path, featurize: Command) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(4):
        random_picture(index, 16, 16).save(folder / f"{index}.png")
    command = ("extract", f"folder:{folder}", "--encoder", "pixels", "--z0", "pixels:8", "--out", tmp_path / "root")
    assert featurize(*command, "--levels", "1x1x4", "--workers", 0).code == 0
    folder.rename(tmp_path / "elsewhere")
    for more in ((), ("--raw",)):
        outcome = featurize("knn-viz", "--stores", tmp_path / "root", "--encoder", "pixels", *more)
        assert outcome.code == 1 and "can't be read any more" in outcome.err, outcome.err


def test_stores_of_other_pictures_are_refused(extraction: Path, tmp_path: Path, featurize: Command) -> None:
    assert featurize("extract", "scenes", "--limit", 8, "--levels", "2x2x8", "--out", tmp_path / "s").code == 0
    outcome = featurize("knn-viz", "--stores", f"{extraction},{tmp_path / 's'}", "--encoder", f"{ENCODER},tiny")
    assert outcome.code == 1
    assert "same pictures" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--rows", "2"), "from 3 on"),
        (("--rows", "many"), "or all"),
        (("--raw", "--encoder", f"{ENCODER},tiny"), "one encoder"),
        (("--encoder", "tiny"), "There is no store"),
    ],
)
def test_wrong_requests_are_one_sentence(
    extraction: Path, featurize: Command, arguments: tuple[str, ...], sentence: str
) -> None:
    outcome = featurize("knn-viz", "--stores", extraction, "--encoder", ENCODER, *arguments)
    assert outcome.code == 1
    assert sentence in outcome.err and outcome.err.startswith("error: ")


def test_exact_copies_count_neither_for_agreement_nor_overlap(
    picture_folder: Path, vit_weights: Path, tmp_path: Path
) -> None:
    """Every picture thrice, as three keys: the numbers are those of a search among other pictures."""
    from featurize.extraction.extract import extract
    from featurize.recipe import read_request

    for source in sorted(picture_folder.rglob("*.*g")):
        for copy in range(3):
            target = tmp_path / "thrice" / source.parent.name / f"{copy}-{source.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    extract(read_request(None, options(tmp_path / "thrice", vit_weights, tmp_path / "root"), "2x2x8"), 0, None)
    numbers = knn_viz([Compared(tmp_path / "root", ENCODER)], tmp_path / "knn.png", 1, 3, None, 0)
    assert numbers["chance"] == pytest.approx(57 / 177)
    # Labels say nothing about these pictures, so neighbours agree by chance; with two copies among ten it would be 0.2 more.
    assert all(abs(share - numbers["chance"]) < 0.12 for share in numbers["label_agreement"].values())


def test_copies_of_the_query_are_left_out(extraction: Path) -> None:
    rows = np.array([5, 5, 9, 30])  # the first two are the same picture
    pixels = Thumbnails(read_ledger(extraction), rows, "ignore")
    assert pixels.similarity(0, 1) == pytest.approx(1)
    kept = pixels.without_copies(np.array([0]), np.array([[0, 1, 2, 3, -1]]), 3)
    np.testing.assert_array_equal(kept, [[2, 3, -1]])
