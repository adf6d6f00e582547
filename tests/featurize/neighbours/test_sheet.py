"""What stands below an image of the neighbours' sheet."""

from __future__ import annotations

import pytest

from featurize.neighbours.sheet import _legend
from featurize.sources import SourceImage


@pytest.mark.parametrize(
    ("label", "captions", "legend"),
    [
        (1, (), "hot dog"),
        (7, (), "class 7"),
        (None, (), ""),
        (1, ("a dog in a bun",), "a dog in a bun"),
    ],
)
def test_a_label_has_its_name(label: int | None, captions: tuple[str, ...], legend: str) -> None:
    image = SourceImage(key="k", source="s", offset=0, size=1, label=label, captions=captions)
    assert _legend(image, ("cat", "hot dog")) == legend
