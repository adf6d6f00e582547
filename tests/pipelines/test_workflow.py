"""The Snakefile itself: which jobs each recipe has before there is any data, and that the commands take what they are given."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

from tests.pipelines.conftest import Snakemake

RECIPES = sorted((Path(__file__).parents[2] / "pipelines" / "recipes").glob("*.yaml"))


@dataclass(frozen=True)
class Expected:
    """By the paper's tables: the largest L, denoisers (a top for each L; each level but the top at each σ) and hierarchies that
    are scored (one for L = 1, and each σ above). `own` scores in the encoder of the levels, `held` against held-out pictures.
    Each level but z_0 is frozen to real pictures once."""

    deepest: int
    trained: int
    scored: int
    chosen: int = 0
    own: bool = True
    held: bool = False

    @property
    def jobs(self) -> dict[str, int]:
        jobs = {"all": 1, "report": 1, "sheet": 1, "hierarchy": 1, "knn": 1, "extract": 1, "train": self.trained}
        jobs |= {"real_images": 1, "real_decoded": 1}
        jobs |= {"sample": self.scored, "sample_like": self.deepest - 1}
        jobs |= dict.fromkeys(("encode_samples", "evaluate"), self.scored + self.deepest - 1)
        jobs |= {"extract_reference": 1} if self.held else {}
        jobs |= {} if self.own else {"extract_scored": 1}
        return jobs | ({"choose": self.chosen, "table": 1} if self.chosen else {})


EXPECTED = {
    "coco-uncond": Expected(5, 5 + 4 * 4, 1 + 4 * 4, 4, held=True),
    "coco-text": Expected(3, 3 + 2 * 4, 1 + 2 * 4, 2, held=True),
    "coco-text-to-image": Expected(2, 2, 1, held=True),
    "imagenet100-uncond": Expected(4, 4 + 3 * 4, 1 + 3 * 4, 3),
    "imagenet100-class": Expected(3, 3 + 2 * 4, 1 + 2 * 4, 2),
    "imagenet100-vae-uncond": Expected(3, 3, 1, own=False),
    "imagenet100-vae-class": Expected(3, 3, 1, own=False),
    "imagenet100-rcg-uncond": Expected(2, 2, 1, own=False),
    "imagenet100-rcg-class": Expected(2, 2, 1, own=False),
    "imagenet100-8x8x256-uncond": Expected(2, 2, 1),
    "imagenet100-8x8x256-class": Expected(2, 2, 1),
    "imagenet-class": Expected(2, 2 + 1, 2),
}
SHARDS = "wds:data/imagenette64/val-{000000..000003}.tar"


def commands_in(line: str) -> Iterator[tuple[str, list[str]]]:
    """(program, its words) of each of our commands in a line of the shell; what the shell itself puts in is σ or a folder."""
    for part in re.sub(r"\$\([^)]*\)", "1", line).split(" && "):
        words = [word for word in shlex.split(part) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
        words = words[1:] if words[:1] == ["on_gpu"] else ["nestgen", *words] if words[:1] == ["train"] else words
        if words and words[0] in ("featurize", "nestgen"):
            yield words[0], words[1:]


def as_click_reads(program: str, words: list[str]) -> dict[str, Any]:
    """A command's options. Raises click.UsageError for one that the command has not."""
    from featurize.cli.main import commands
    from nestgen.cli.main import main

    group = commands if program == "featurize" else main
    assert isinstance(group, click.Group)
    return group.commands[words[0]].make_context(words[0], words[1:]).params


@pytest.mark.parametrize("file", RECIPES, ids=[file.stem for file in RECIPES])
def test_a_recipe_lists_its_jobs_without_data(snakemake: Snakemake, file: Path, tmp_path: Path) -> None:
    found = snakemake(file, tmp_path, dry=True)
    if file.stem in EXPECTED:
        assert dict(found.jobs) == EXPECTED[file.stem].jobs
    if file.stem == "coco-vae-neighbours":  # a figure, for which nothing is trained
        assert dict(found.jobs) == {"all": 1, "knn": 1, "extract": 1}
    called = {
        rule: [as_click_reads(program, words) for line in lines for program, words in commands_in(line)]
        for rule, lines in found.shell.items()
    }
    for rule in called.keys() - {"all", "choose", "report"}:
        assert len(called[rule]) == found.jobs[rule]
    captioned = Path("stores/coco-val") if file.stem.startswith("coco-text") else None
    samples = [*called.get("sample", []), *called.get("sample_like", [])]
    assert all(sample["prompts"] == captioned for sample in samples)
    if file.stem.startswith(("imagenet100-vae", "imagenet100-rcg")):
        assert {called[rule][0]["encoder"] for rule in ("extract_scored", "evaluate")} == {"mocov3"}
    if file.stem == "mini-photos-pixels":  # neither Snakemake nor the shell takes the braces for its own
        assert {called[rule][0]["source"] for rule in ("extract_reference", "extract_scored_reference")} == {SHARDS}
        assert f"'{SHARDS}'" in found.shell["extract_reference"][0]


def test_captions_without_held_out_images_are_those_of_the_training_rows(
    snakemake: Snakemake, pipelines: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "captioned.yaml"
    base = pipelines / "recipes/coco-text-to-image.yaml"
    recipe.write_text(f"base: {base}\nevaluation: {{reference: null}}\n")
    found = snakemake(recipe, tmp_path, dry=True)
    assert "extract_reference" not in found.jobs
    assert all("--prompts stores/coco-train" in line for line in found.shell["sample"])


def test_an_encoder_that_only_scores_has_its_arguments_everywhere(
    snakemake: Snakemake, pipelines: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "scored.yaml"
    arguments = {"img_size": 64, "patch_size": 8}
    grid = json.dumps({"scored_by": {"encoder": "timm:vit_tiny_patch16_224", "model_args": arguments}})
    recipe.write_text(f"base: {pipelines / 'recipes/imagenet100-rcg-uncond.yaml'}\ngrid: {grid}\n")
    found = snakemake(recipe, tmp_path, dry=True)
    [(program, words)] = commands_in(found.shell["extract_scored"][0])
    assert json.loads(as_click_reads(program, words)["model_args"]) == arguments


ON_A_GPU = {"featurize": {"extract"}, "nestgen": {"train", "sample", "hierarchy", "evaluate", "decode"}}


@pytest.mark.parametrize("name", ["demo", "mini-photos-pixels"])
def test_what_computes_on_a_gpu_claims_one_and_sees_no_other(
    snakemake: Snakemake, pipelines: Path, tmp_path: Path, name: str
) -> None:
    """Of several in one machine. An extraction takes all cores, so it runs alone and may see all of them."""
    found = snakemake(pipelines / "recipes" / f"{name}.yaml", tmp_path, dry=True, gpus=2)
    for rule, lines in found.shell.items():
        commands = [command for line in lines for command in commands_in(line)]
        on_a_gpu = any(words[0] in ON_A_GPU[program] for program, words in commands)
        assert found.gpus[rule] == {int(on_a_gpu)}, rule
        pinned = all(re.search(r"\bon_gpu (nestgen|featurize) |(^| )train ", line) for line in lines)
        assert pinned or not on_a_gpu or rule.startswith("extract"), rule
