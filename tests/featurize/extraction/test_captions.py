"""Captions embedded beside the images they belong to."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from featurize.errors import UserError
from featurize.execution.tasks import run_here
from featurize.extraction.captions import embed_prompts
from featurize.extraction.extract import extract
from featurize.recipe import read_request
from featurize.text.tower import TextSpec
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


def test_prompts_are_lines_and_nothing_else_ends_one(tmp_path: Path) -> None:
    """A byte-order mark is no part of the first prompt, nor do signs end a line that only `str.splitlines` takes for breaks."""
    weights = tmp_path / "text.pt"
    torch.save(clip_state(64, 2, 16, 4, 24, (32, 2, 77)), weights)
    network = {"width": 32, "heads": 2, "layers": 2, "activation": "quick_gelu"}
    weights.with_suffix(".json").write_text(json.dumps({"model_args": network}))
    (tmp_path / "prompts.txt").write_bytes("\ufeffa dog\r\na\u2028cat\x1c\n\nthe end".encode())
    embed_prompts(tmp_path / "prompts.txt", tmp_path / "out", TextSpec("clip", str(weights)), run_here)
    table = pq.read_table(tmp_path / "out" / "prompts.parquet")
    assert table["prompt"].to_pylist() == ["a dog", "a\u2028cat\x1c", "", "the end"]
    (tmp_path / "prompts.txt").write_bytes(b"un caf\xe9\n")
    with pytest.raises(UserError, match="are not UTF-8 text"):
        embed_prompts(tmp_path / "prompts.txt", tmp_path / "other", TextSpec("clip", str(weights)), run_here)
