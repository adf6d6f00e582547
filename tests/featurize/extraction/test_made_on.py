"""A run that another device began is gone on with, says how far the two agree, and writes both down."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from featurize.execution.precision import AGREEMENT
from featurize.extraction import networks
from featurize.extraction.extract import extract
from featurize.recipe import Request, read_request
from featurize.store.layout import level_path
from featurize.store.metadata import ArraySpec, read_metadata, spec_of
from featurize.store.seal import unseal

BASE, Z0, PIXELS = "tiny/base.zarr", "vae/8x8x8.zarr", "pixels/16x16x3.zarr"


def request(root: Path, **more: object) -> Request:
    return read_request(None, {"source": "scenes:16", "out": str(root), "limit": 70, **more}, "2x2x4")


def devices(root: Path, array: str) -> list[str]:
    return read_metadata(root / array).attributes.get("devices", [])


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the machine calls its device: the one item, which a test changes as if the run went on elsewhere."""
    name = ["GPU A"]
    monkeypatch.setattr(networks, "device_name", lambda device: name[0])
    return name


def lacking_a_block(root: Path, array: str) -> ArraySpec:
    """A sealed array made an unfinished one, as a run leaves it that was stopped."""
    spec = spec_of(root / array)
    assert spec.blocks > 1
    unseal(spec, {1})
    return spec


def test_a_run_goes_on_on_another_device_and_says_so(
    device: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "s"
    asked = request(root, z0="vae:32", z0_weights="tiny", z0_precision="bfloat16")
    extract(asked, 0, None)
    assert devices(root, BASE) == devices(root, Z0) == ["GPU A"]
    for array in (BASE, Z0):
        lacking_a_block(root, array)
    extract(asked, 0, None)
    assert not caplog.records and devices(root, BASE) == ["GPU A"]

    lacking_a_block(root, Z0)
    device[0] = "GPU B"
    with caplog.at_level(logging.WARNING):
        extract(asked, 0, None)
    [told] = caplog.messages
    agreed = f"in bfloat16 their rows agree to {AGREEMENT['bfloat16']:.1%} of their length"
    assert f"{root / Z0} was begun on GPU A and goes on on GPU B: {agreed}" in told
    assert (devices(root, Z0), devices(root, BASE)) == (["GPU A", "GPU B"], ["GPU A"])  # which was whole
    caplog.clear()
    extract(asked, 0, None)
    assert not caplog.records


def test_pixels_are_the_same_on_every_device(
    device: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "s"
    extract(request(root, z0="pixels:16"), 0, None)
    lacking_a_block(root, PIXELS)
    device[0] = "GPU B"
    extract(request(root, z0="pixels:16"), 0, None)
    assert not caplog.records and devices(root, PIXELS) == []


def test_arrays_of_earlier_versions_name_no_device_and_are_gone_on_with(
    device: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featurize.extraction import extract as module
    from featurize.extraction import first_pass

    root = tmp_path / "s"
    with monkeypatch.context() as earlier:
        for each in (module, first_pass):
            earlier.setattr(each, "noting_device", lambda targets, features, device: targets)
        extract(request(root), 0, None)
    lacking_a_block(root, BASE)
    extract(request(root), 0, None)
    assert not caplog.records and devices(root, BASE) == []
    assert level_path(root / "tiny", (2, 2, 4)).is_dir()
