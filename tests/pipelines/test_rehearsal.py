"""Two recipes of the paper from pictures to report, in small: what `make rehearse` runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nestgen.recipe.yaml import read_yaml
from tests.pipelines.conftest import Snakemake


@pytest.fixture
def rehearsed(pipelines: Path, snakemake: Snakemake, served: None, tmp_path: Path) -> Any:
    """Runs a recipe's rehearsal to its end; its folder."""

    def run(name: str) -> Path:
        recipe = pipelines / "recipes" / f"{name}.yaml"
        done = snakemake(recipe, tmp_path, rehearse=1)
        assert done.jobs["report"] == 1
        assert not snakemake(recipe, tmp_path, rehearse=1, dry=True).jobs, "there is something left to do"
        return tmp_path

    return run


def spaces(folder: Path, cell: str) -> list[str]:
    card = json.loads((folder / f"samples/{cell}/evaluation.json").read_text())
    assert all(score["frechet_distance"] > 0 for score in card["scores"])
    return [score["space"] for score in card["scores"]]


def test_classes_scored_by_an_encoder_that_did_not_make_the_levels(rehearsed: Any) -> None:
    """Table 4b, RCG's vector given the class."""
    folder = rehearsed("imagenet100-rcg-class")
    assert spaces(folder, "L2") == ["z_1", "z_0", "pixels 1x1x64"]
    assert (folder / "runs/imagenet100-rcg-class-rehearsal/z0-given-z1-sigma0/loss.png").is_file()
    page = (folder / "report.html").read_text()
    # Ten images of each: real, through the codec, L = 2; the samples' sheet; levels, neighbours, their overlap.
    assert page.count("data:image/webp;base64,") == 3 * 10 + 1 + 3
    assert page.count("<svg ") == 1  # losses; of one depth no bars


def test_captions_from_the_text_tower_to_the_samples(rehearsed: Any) -> None:
    """Table 3: text tokens in every denoiser, held-out captions for the samples, the reference apart."""
    folder = rehearsed("coco-text-to-image")
    assert spaces(folder, "L2") == ["z_1", "z_0", "tiny 1x1x64"]
    recipe = read_yaml(folder / "nested.yaml")
    assert recipe["denoiser"]["text"] == "77x16"
    card = json.loads((folder / "samples/L2/sample.json").read_text())
    seal = json.loads((folder / "stores/val/text/77x16.seal.json").read_text())
    assert seal["sha256"] in json.dumps(card)
