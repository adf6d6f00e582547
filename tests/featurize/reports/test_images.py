"""`featurize images`: rows of a store as files, as the encoder saw them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from featurize.images.crop import SQUARE, InputSpec, crop
from featurize.images.decode import decode
from featurize.store.ledger import read_ledger
from tests.featurize.conftest import Outcome, random_picture
from tests.featurize.images.test_faults import swapped_profile


def test_rows_are_the_squares_of_their_images(
    extraction: Path, tmp_path: Path, featurize: Callable[..., Outcome]
) -> None:
    done = featurize("images", extraction, "--count", 3, "--size", 24, "--out", tmp_path / "real")
    assert done.code == 0, done.err
    assert sorted(file.name for file in (tmp_path / "real").iterdir()) == ["000000.png", "000001.png", "000002.png"]
    source = read_ledger(extraction).images[2].source
    with Image.open(tmp_path / "real" / "000002.png") as shown, Image.open(source) as original:
        expected = crop(original.convert("RGB"), SQUARE, InputSpec(24, "bicubic"))
        np.testing.assert_array_equal(np.asarray(shown), expected)
    assert "60 images of" in featurize("images", extraction, "--count", 99, "--out", tmp_path / "all").out


def test_colours_are_the_stores_and_what_is_no_longer_the_image_is_one_sentence(
    tmp_path: Path, featurize: Callable[..., Outcome]
) -> None:
    folder, root, out = tmp_path / "pictures", tmp_path / "root", tmp_path / "real"
    folder.mkdir()
    for index in range(3):
        random_picture(index, 16, 16).save(folder / f"{index}.png", icc_profile=swapped_profile())
    extract = ("extract", f"folder:{folder}", "--out", root, "--encoder", "pixels", "--z0", "pixels:8", "--icc", "srgb")
    assert featurize(*extract, "--levels", "1x1x1", "--workers", 0).code == 0
    assert featurize("images", root, "--count", 1, "--size", 16, "--out", out).code == 0
    with Image.open(out / "000000.png") as shown:
        expected = np.asarray(decode((folder / "0.png").read_bytes(), "srgb"))
        np.testing.assert_array_equal(np.asarray(shown), expected)
    for content in ((folder / "0.png").read_bytes(), b"no image", None):
        (folder / "1.png").unlink()
        if content is not None:
            (folder / "1.png").write_bytes(content)
        sentence = "can't be read any more" if content is None else "has changed since the ledger was made"
        outcome = featurize("images", root, "--count", 2, "--out", out)
        assert outcome.code == 1 and "The picture 1.png" in outcome.err and sentence in outcome.err, outcome.err
