"""The Snakefile itself: which jobs a recipe has without any data, and a rehearsal that runs all of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

SNAKEMAKE = Path(sys.executable).with_name("snakemake")


def snakemake(pipelines: Path, folder: Path, recipe: Path, *words: str, cores: int = 2) -> str:
    command = [
        str(SNAKEMAKE),
        "--snakefile",
        str(pipelines / "Snakefile"),
        "--directory",
        str(folder),
        "--cores",
        str(cores),
    ]
    command += [*words, "--config", f"recipe={recipe}"]
    if "rehearse" in words:
        command = [*(word for word in command if word != "rehearse"), "rehearse=1"]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-3000:]
    return text


def jobs(text: str) -> dict[str, int]:
    """The table of jobs that snakemake prints."""
    table = text.partition("Job stats:")[2]
    return {name: int(count) for name, count in re.findall(r"^([a-z_]+) +(\d+)$", table, re.MULTILINE)}


# Of the paper's tables; every other recipe has one of these forms.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("coco-uncond", {"extract": 1, "extract_reference": 1, "train": 5 + 4 * 4, "sample": 17, "evaluate": 17, "choose": 4}),
        ("imagenet100-rcg-class", {"extract": 1, "extract_scored": 1, "train": 2, "sample": 1, "evaluate": 1}),
    ],
)  # fmt: skip
def test_a_paper_recipe_lists_its_jobs_without_data(pipelines: Path, tmp_path: Path, name: str, expected: dict) -> None:
    found = jobs(snakemake(pipelines, tmp_path, pipelines / "recipes" / f"{name}.yaml", "-n"))
    assert expected.items() <= found.items()
    assert ("extract_reference" in found) == ("extract_reference" in expected)
    assert found["report"] == 1


def test_a_rehearsal_ends_in_a_report_resumes_and_redoes_only_what_a_change_reaches(
    pipelines: Path, tmp_path: Path
) -> None:
    """Smaller than a recipe that ships: L = 2 and two σ, at one seed."""
    recipe = tmp_path / "little.yaml"
    document = {
        "name": "little",
        "features": {"source": "imagenet:none", "out": "stores/train", "encoder": "mocov3", "z0": "vae:256"},
        "levels": [{"shape": "32x32x4"}, {"shape": "4x4x32", "sigma": 0.5}],
        "grid": {"depths": [2], "sigmas": [0, 0.5, 1.0]},
    }
    recipe.write_text(yaml.safe_dump(document))
    folder = tmp_path / "run"
    folder.mkdir()
    snakemake(pipelines, folder, recipe, "rehearse")
    assert (folder / "report.html").stat().st_size > 10_000
    chosen = json.loads((folder / "chosen" / "L2.json").read_text())
    assert len(chosen["tried"]) == 2
    assert sorted(path.name for path in (folder / "runs" / "little-rehearsal").iterdir()) == [
        "z0-given-z1-sigma0",
        "z0-given-z1-sigma0.5",
        "z1-top",
    ]
    assert "Nothing to be done" in snakemake(pipelines, folder, recipe, "-n", "rehearse")

    recipe.write_text("# a comment\n" + yaml.safe_dump(document))
    assert jobs(snakemake(pipelines, folder, recipe, "-n", "rehearse")).keys() <= {"recipe", "all", "total"}

    document["grid"]["sigmas"] = [0, 1.0]  # type: ignore[index]
    recipe.write_text(yaml.safe_dump(document))
    found = jobs(snakemake(pipelines, folder, recipe, "-n", "rehearse"))
    assert (found["train"], found["sample"], found["evaluate"]) == (1, 1, 1)
    assert not found.keys() & {"extract", "knn"}

    document["levels"].append({"shape": "2x2x16", "sigma": 0.5})  # type: ignore[attr-defined]
    recipe.write_text(yaml.safe_dump(document))
    found = jobs(snakemake(pipelines, folder, recipe, "-n", "rehearse"))
    assert found["extract"] == 1  # derives a level; featurize finds the pictures extracted
    assert found["train"] == 1
