"""A prompt's way through both packages: CLIP's text tower, in the official layout with random weights, to a picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from click.testing import CliRunner

from featurize.extraction.extract import extract
from featurize.recipe import read_request
from featurize.text.tower import TextSpec, load_text_encoder
from nestgen.cli.main import main
from nestgen.files import read_json
from nestgen.recipe.recipe import load_recipe
from nestgen.training.train import train
from tests.featurize.layouts import clip_state, described


def test_a_prompt_is_embedded_as_the_captions_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(clip_state(32, 1, 16, 4, 8, (16, 1, 77)), tmp_path / "text.pt")
    described(tmp_path / "text.pt", width=16, layers=1, heads=2)
    recipe = {
        "name": "text",
        "features": {"source": "scenes:16", "out": "stores/train", "encoder": "tiny", "z0": "pixels:8", "limit": 8},
        "levels": [{"shape": "8x8x3", "patch": 4}, {"shape": "2x2x8", "sigma": 0.5}],
        "denoiser": {"size": "nano", "text": "77x16"},
        "training": {"steps": 1, "batch": 4, "warmup": 1, "preview": 0},
        "sampling": {"steps": 1},
    }
    recipe["features"] |= {"text": "clip", "text_weights": "text.pt"}  # type: ignore[operator]
    Path("nested.yaml").write_text(json.dumps(recipe))
    extract(read_request(None, {}, "2x2x8"), workers=0, scheduler=None)
    for level in (0, 1):
        train(load_recipe(), level)

    def sample(out: str, *options: str) -> np.ndarray:
        run = CliRunner().invoke(main, ["sample", "--count", "2", "--out", out, *options])
        assert run.exit_code == 0, run.output
        return zarr.open_array(str(tmp_path / out / "latents" / "z1.zarr"), mode="r")[:]

    prompt = "a red ball beside a blue box"
    assert np.abs(sample("plain") - sample("given", "--prompt", prompt)).max() > 0
    assert read_json(Path("given/sample.json"))["text"]["captions"] == prompt
    [embedded] = Path("prompts").glob("*/text/77x16.zarr")
    found = zarr.open_array(str(embedded), mode="r")[:]
    encoder = load_text_encoder(TextSpec("clip", str(tmp_path / "text.pt")), "cpu")
    np.testing.assert_allclose(found, encoder.encode(["", prompt]), atol=5e-3)
    captions = zarr.open_array("stores/train/text/77x16.zarr", mode="r")[:]
    np.testing.assert_array_equal(found[0], captions[0])
