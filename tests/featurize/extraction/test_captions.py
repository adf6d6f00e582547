"""Captions embedded beside the images they belong to."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from featurize.extraction.extract import extract
from featurize.recipe import read_request
from tests.featurize.layouts import clip_state


def test_captions_that_are_embedded_already_are_left_as_they_are(shard: Path, tmp_path: Path) -> None:
    weights = tmp_path / "text.pt"
    torch.save(clip_state(64, 2, 16, 4, 24, (32, 2, 77)), weights)
    network = {"width": 32, "heads": 2, "layers": 2, "activation": "quick_gelu"}
    weights.with_suffix(".json").write_text(json.dumps({"model_args": network}))
    root = tmp_path / "root"
    options = {"source": f"wds:{shard}", "out": str(root), "encoder": "pixels", "z0": "pixels:16", "text": "clip"}
    request = read_request(None, options | {"text_weights": str(weights)}, "2x2x3")
    paths = extract(request, workers=0, scheduler=None)
    assert [path.relative_to(root).as_posix() for path in paths[-2:]] == ["text/77x32.zarr", "text/offsets.zarr"]
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert extract(request, workers=0, scheduler=None) == paths
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
