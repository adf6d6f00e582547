"""Every recipe that ships: read by both packages and the workflow, and true to the paper's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from nestgen.recipe.yaml import read_yaml

RECIPES = sorted((Path(__file__).parents[2] / "pipelines" / "recipes").glob("*.yaml"))
PAPER = read_yaml(RECIPES[0].parents[1] / "paper.yaml")
SIZES = {"coco": "small", "imagenet100": "medium", "imagenet": "large"}
by_name = pytest.mark.parametrize("file", RECIPES, ids=[file.stem for file in RECIPES])


@by_name
def test_both_packages_and_the_workflow_read_it(file: Path) -> None:
    from featurize.encoders import kinds
    from featurize.recipe import read_request
    from nestgen.recipe.recipe import load_recipe
    from workflow.plan import read_plan

    recipe, request, plan = load_recipe(file), read_request(file, {}, None), read_plan(file)
    assert recipe.name == plan.name == file.stem
    assert [level.shape for level in recipe.levels[1:]] == list(request.levels)
    assert max(plan.depths, default=0) <= len(recipe.levels)
    encoder, _, variant = request.features.encoder.partition(":")
    assert encoder in kinds()
    assert variant in kinds()[encoder].variants or kinds()[encoder].any_variant
    if recipe.evaluation.reference:
        assert recipe.evaluation.reference != recipe.features.out


@by_name
def test_its_hierarchies_are_those_the_paper_prints(file: Path) -> None:
    from workflow.plan import read_plan

    plan = read_plan(file)
    printed = PAPER[file.stem].get("fid", {})
    cells = {cell.name for cell in plan.cells()}
    assert set(printed) <= cells
    if printed:
        assert cells == set(printed)
    text = file.read_text(encoding="utf-8")
    comment = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    for fid in printed.values():
        assert f"{fid:.2f}".removesuffix("0") in comment, f"{file.name} does not say that {fid} is expected"
    for other in PAPER[file.stem].get("compare", {}):
        assert (file.parent / f"{other}.yaml").is_file()


@by_name
def test_its_settings_are_u_vit_s(file: Path) -> None:
    from nestgen.recipe.recipe import load_recipe

    recipe, data = load_recipe(file), file.stem.split("-")[0]
    if data not in SIZES or file.stem == "coco-vae-neighbours":
        return
    training = recipe.training
    assert recipe.denoiser.size == SIZES[data]
    assert (training.lr, training.weight_decay, training.warmup, training.ema) == (2e-4, 0.03, 5000, 0.9999)
    assert recipe.sampling.of("steps", 0) == 50
    if data == "coco":
        assert (recipe.process.kind, training.betas, training.batch) == ("discrete", (0.9, 0.9), 256)
        assert recipe.sampling.of("sampler", 0) == "dpm++-single"
        assert (recipe.sampling.of("guidance", 0), recipe.evaluation.count) == (1.0, 30_000)
        assert (recipe.denoiser.text is not None) == ("text" in file.stem)
    else:
        assert (recipe.process.kind, training.betas, training.batch) == ("vp", (0.99, 0.99), 1024)
        assert recipe.sampling.of("sampler", 0) == "dpm-single"
        assert (recipe.sampling.of("guidance", 0), recipe.evaluation.count) == (0.4, 50_000)
        classes = {"imagenet": 1000}.get(data, 100) if file.stem.endswith("class") else 0
        assert recipe.denoiser.labels == classes


def test_sample_counts_of_protocols_are_nestgen_s() -> None:
    from nestgen.recipe.protocols import PROTOCOLS
    from workflow.plan import PROTOCOL_COUNTS

    assert {name: protocol.count for name, protocol in PROTOCOLS.items()} == PROTOCOL_COUNTS


@by_name
def test_it_can_be_rehearsed(file: Path) -> None:
    """The small recipe is one for both packages too, with the same levels and at most two σ."""
    from featurize.recipe import Features
    from nestgen.recipe.recipe import Recipe
    from workflow.plan import read_plan
    from workflow.rehearsal import configured

    plan = read_plan(file)
    small = configured(plan, file, {"rehearse": 1})
    recipe = Recipe.model_validate(small.document)
    Features.model_validate(small.document["features"])
    assert len(recipe.levels) == len(plan.levels)
    assert small.depths == plan.depths
    assert recipe.name == f"{file.stem}-rehearsal"
    assert not recipe.denoiser.gaussian  # 64 images are too few for it
    assert all(h <= 8 and w <= 8 and c <= 64 for h, w, c in (level.shape for level in recipe.levels[1:]))
    assert len(small.grid.sigmas or ()) in (0, 2)
