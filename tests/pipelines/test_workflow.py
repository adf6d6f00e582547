"""The Snakefile itself: which jobs a recipe has without any data."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
COCO = {
    "extract": 1,
    "extract_reference": 1,
    "train": 5 + 4 * 4,
    "sample": 17,
    "sample_like": 4,
    "evaluate": 21,
    "choose": 4,
}
RCG = {"extract": 1, "extract_scored": 1, "train": 2, "sample": 1, "sample_like": 1, "evaluate": 2}


@pytest.mark.parametrize(("name", "expected"), [("coco-uncond", COCO), ("imagenet100-rcg-class", RCG)])
def test_a_paper_recipe_lists_its_jobs_without_data(pipelines: Path, tmp_path: Path, name: str, expected: dict) -> None:
    found = jobs(snakemake(pipelines, tmp_path, pipelines / "recipes" / f"{name}.yaml", "-n"))
    assert expected.items() <= found.items()
    assert ("extract_reference" in found) == ("extract_reference" in expected)
    assert found["report"] == 1
