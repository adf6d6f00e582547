from __future__ import annotations

from pathlib import Path

import pytest

from featurize.errors import UserError
from featurize.extraction.extract import extract
from featurize.extraction.plan import estimate, stores_of
from featurize.recipe import read_request
from featurize.store.read import open_array

RECIPES = Path(__file__).parents[3] / "pipelines" / "recipes"


def test_the_stores_are_those_an_extraction_leaves(tmp_path: Path) -> None:
    options = {"source": "scenes:16", "out": str(tmp_path / "s"), "limit": 20, "z0": "vae:16", "z0_weights": "tiny"}
    request = read_request(None, options, "4x4x8,2x2x4")
    planned = stores_of(request, 20, 0)
    assert "20 pictures of scenes:16" in estimate(request, None, 10.0, False)
    extract(request, 0, None)
    for store in planned:
        array = open_array(tmp_path / "s" / store.name)
        assert (array.shape, array.nbytes) == (store.shape, store.bytes)
    again = stores_of(request, 20, 0)  # from the cards of the run
    assert again == planned


def test_a_paper_recipe_is_planned_without_its_data_or_weights() -> None:
    request = read_request(RECIPES / "imagenet100-uncond.yaml", {}, None)
    text = estimate(request, 127_000, 100.0, False)
    assert "127000x2x14x14x64" in text
    assert "127000x2x32x32x8" in text
    assert f"hours: {(127_000 + 65_536) / 100 / 3600:.3g} at 100 pictures/s" in text
    assert "give --rate" in estimate(request, 127_000, None, False)
    with pytest.raises(UserError, match="--measure needs the pictures"):
        estimate(request, 127_000, None, True)


PUBLISHED = {"coco": "82,783", "imagenet100": "128,117", "imagenet": "1,281,167"}


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_is_planned_where_there_is_no_data(file: Path) -> None:
    request, data = read_request(file, {}, None), file.stem.split("-")[0]
    if "photos" in file.stem:
        with pytest.raises(UserError, match=r"is not there; .* give --rows N"):
            estimate(request, None, 300.0, False)
        return
    text = estimate(request, None, 300.0, False)
    listed = PUBLISHED.get(data) or f"{request.features.limit:,}"
    assert text.startswith(f"{listed} pictures of ")
    assert ("so many are published" in text) == (data in PUBLISHED)
    rows = int(text.split()[0].replace(",", ""))
    # Half-floats: the base store, each level, z_0's moments.
    [base] = [store for store in stores_of(request, rows, 0) if store.name.endswith("base.zarr")]
    assert base.shape[-1] == max(request.features.base_channels, *(channels for *_, channels in request.levels))
    assert base.bytes > rows * request.features.views * 2 * request.levels[0][0] * request.levels[0][1]
    assert ("text/77x768.zarr" in text) == (request.features.text is not None)


def test_a_rate_can_be_measured(tmp_path: Path) -> None:
    options = {"source": "scenes:16", "out": str(tmp_path / "s"), "limit": 8, "encoder": "pixels", "z0": "pixels:16"}
    assert "measured here" in estimate(read_request(None, options, "2x2x4"), None, None, True)
