"""What a first look at an image says of it, and what a later one does not."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from featurize.extraction.reading import first_look, load_crops_of
from featurize.images.crop import SQUARE, InputSpec
from featurize.sources import SourceImage


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("size", [(1, 1001), (65_535, 60)])
def test_a_line_is_refused_when_it_is_new(size: tuple[int, int]) -> None:
    look = first_look(lambda: png(*size))
    assert look.image is None and look.examined.reason.startswith(f"{size[0]} x {size[1]} pixels are a line")
    assert not first_look(lambda: png(1, 1000)).examined.reason


def test_a_line_that_a_store_has_is_still_read() -> None:
    data = png(1, 1500)
    image = SourceImage("line", "line.png", 0, len(data), None, ())
    crops, *_ = load_crops_of(
        image, lambda: data, hashlib.sha256(data).hexdigest(), SQUARE, (InputSpec(8, "bicubic"),), "ignore"
    )
    assert isinstance(crops, tuple)
    np.testing.assert_array_equal(crops[0], np.zeros((8, 8, 3), np.uint8))
