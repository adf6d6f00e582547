"""`featurize images`: rows of a store as files, as the encoder saw them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from featurize.images.crop import SQUARE, InputSpec, crop
from featurize.store.ledger import read_ledger
from tests.featurize.conftest import Outcome


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
