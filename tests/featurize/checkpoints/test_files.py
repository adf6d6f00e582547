"""The JSON beside a weights file: what can't be is one sentence, whatever the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from featurize.checkpoints.files import sidecar
from featurize.errors import UserError

GOOD = {
    "model": "vit_tiny_patch16_224",
    "model_args": {"depth": 2},
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 1, 0.5],
    "interpolation": "bicubic",
    "input_size": 64,
    "golden": [0.1, -2],
    "anything": ["else"],
}


def test_a_sound_description_is_read_as_it_is(tmp_path: Path) -> None:
    assert sidecar(tmp_path / "x.pth") == {}
    (tmp_path / "x.json").write_text(json.dumps(GOOD))
    assert sidecar(tmp_path / "x.pth") == GOOD


@pytest.mark.parametrize(
    ("key", "bad"),
    [
        ("mean", [0.5, 0.5]),
        ("mean", 0.5),
        ("mean", ["0.5", "0.5", "0.5"]),
        ("mean", [0.5, float("nan"), 0.5]),
        ("std", [0.5, 0.5, 0.0]),
        ("std", None),
        ("std", [0.5, 0.5, True]),
        ("model", 7),
        ("model_args", [["depth", 2]]),
        ("interpolation", None),
        ("input_size", "64"),
        ("input_size", 0),
        ("input_size", True),
        ("golden", "0.1"),
    ],
)
def test_what_cannot_be_is_one_sentence(tmp_path: Path, key: str, bad: Any) -> None:
    (tmp_path / "x.json").write_text(json.dumps(GOOD | {key: bad}))
    with pytest.raises(
        UserError, match=rf"x\.json, which describes the weights .* says {key} .* must be .*; fix or remove"
    ):
        sidecar(tmp_path / "x.pth")
