"""Held-out images take classes from the store whose basis they take, and images that are in both are counted."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import zarr

from featurize.extraction.extract import extract
from featurize.extraction.scan import list_requested
from featurize.recipe import Features, read_request
from featurize.store.ledger import read_ledger
from tests.featurize.conftest import options, random_picture


def test_a_validation_folder_that_lacks_a_class_is_numbered_as_the_training_store(
    extraction: Path, vit_weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_ledger(extraction).classes == ("class-0", "class-1", "class-2")
    assert zarr.open_array(extraction / "labels.zarr", mode="r").attrs["classes"] == ["class-0", "class-1", "class-2"]
    held_out = tmp_path / "held-out"
    for index, name in enumerate(("class-2", "class-0", "another", "class-2")):
        (held_out / name).mkdir(parents=True, exist_ok=True)
        random_picture(100 + index).save(held_out / name / f"{index}.png")
    request = read_request(None, options(held_out, vit_weights, tmp_path / "s", basis=str(extraction)), "2x2x8")
    extract(request, workers=0, scheduler=None)
    ledger = read_ledger(tmp_path / "s")
    assert [key.partition("/")[0] for key in ledger.keys] == ["another", "class-0", "class-2", "class-2"]
    assert ledger.labels.tolist() == [3, 0, 2, 2]
    assert ledger.classes == ("class-0", "class-1", "class-2", "another")
    assert "Classes that it lacks are numbered after its own: 1 (first: another)" in caplog.text
    assert "whose basis is taken" not in caplog.text
    extract(request, workers=0, scheduler=None)  # finds all there


def test_labels_without_names_are_remarked(extraction: Path, picture_folder: Path, tmp_path: Path) -> None:
    """As those of stores of 0.1.0."""
    old = shutil.copytree(extraction, tmp_path / "old")
    table = pq.read_table(old / "rows.parquet")
    metadata = {key: value for key, value in table.schema.metadata.items() if key != b"classes"}
    pq.write_table(table.replace_schema_metadata(metadata), old / "rows.parquet")
    listing = list_requested(Features(out="x", source=f"folder:{picture_folder}", basis=str(old)))
    assert listing.remarks == (
        f"The labels of {old} have no names, so it is not checked that these number the same classes.",
    )


def test_images_that_the_other_store_holds_are_counted(
    extraction: Path, picture_folder: Path, vit_weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(picture_folder / "class-1", tmp_path / "held-out" / "class-1")
    random_picture(1000).save(tmp_path / "held-out" / "class-1" / "new.png")
    arguments = options(tmp_path / "held-out", vit_weights, tmp_path / "s", basis=str(extraction))
    with caplog.at_level(logging.WARNING):
        extract(read_request(None, arguments, "2x2x8"), workers=0, scheduler=None)
    assert f"20 of 21 pictures are also in {extraction}, whose basis is taken" in caplog.text
    assert set(read_ledger(tmp_path / "s").labels.tolist()) == {1}
