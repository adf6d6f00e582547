"""Counts come from the built modules and agree with the paper's columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nestgen.cli.info import show
from nestgen.denoiser.config import SIZES, DenoiserConfig
from nestgen.denoiser.flops import PAPER, Counts, count, growth
from nestgen.denoiser.uvit import Denoiser
from nestgen.recipe.recipe import load_recipe

Shape = tuple[int, int, int]


def grown(size: str, shapes: tuple[Shape, ...], labels: int = 0) -> list[Counts]:
    """Growth at L = 1, 2, ..."""
    dim, depth, heads = SIZES[size]
    configs = [
        DenoiserConfig(shape, 2 if min(shape[:2]) >= 4 else 1, dim, depth, heads, labels=labels) for shape in shapes
    ]
    given = [replace(one, condition_shapes=(two.shape,)) for one, two in zip(configs, configs[1:])]
    depths = [[*given[:depth], configs[depth]] for depth in range(len(configs))]
    return [growth(before, after) for before, after in zip([[], *depths], depths)]


def test_coco_columns() -> None:
    paper = PAPER[0]
    found = grown(paper.size, paper.shapes)
    for counts, parameters in zip(found, paper.parameters, strict=True):
        assert counts.parameters / 1e6 == pytest.approx(parameters, rel=1e-3)
    for counts, gflops in zip(found[:4], paper.gflops[:4], strict=True):
        assert counts.gflops == pytest.approx(gflops, rel=0.02)
    assert round(found[0].gflops, 2) == 22.70
    assert found[4].gflops == pytest.approx(0.57, abs=0.005)  # the paper's 0.71 is not explained


def test_this_designs_imagenet_columns() -> None:
    """denoiser.md's, which count the label token and embedding of 1000 classes."""
    medium = grown("medium", PAPER[1].shapes, labels=1000)
    assert [counts.parameters / 1e6 for counts in medium[1:3]] == pytest.approx([175.1, 170.8], abs=0.06)
    assert [counts.gflops for counts in medium[1:3]] == pytest.approx([25.5, 2.29], rel=0.01)
    large = grown("large", ((32, 32, 4), (6, 6, 32)), labels=1000)
    assert [counts.parameters / 1e6 for counts in large] == pytest.approx([286.5, 376.4], abs=0.06)
    assert [counts.gflops for counts in large] == pytest.approx([147.4, 52.2], rel=0.002)


@pytest.mark.parametrize("above", [(), ((4, 4, 6),), ((4, 4, 6), (2, 2, 5))])
def test_the_true_count_is_torchs(above: tuple[Shape, ...]) -> None:
    """But for biases, norms and GELU: together under 1%. Deconvolutions are counted at input positions, as torch does."""
    config = DenoiserConfig((16, 16, 3), 2, 512, 4, 8, above, labels=3, text=(7, 64))
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        Denoiser(config)(torch.empty(1, 3, 16, 16), torch.empty(1))
    assert count(config).gflops_true == pytest.approx(counter.get_total_flops() / 1e9, rel=0.01)
    # the two attention products of 5 blocks over 64 + 9 tokens; at 4 sites deconvolutions to 8x8 from 4x4 and from 2x2
    products, deconvolutions = 5 * 4 * 73**2 * 512, [(16 - 64) * 6 * 512 * 2**2, (4 - 64) * 5 * 512 * 4**2]
    further = products + 4 * 2 * sum(deconvolutions[: len(above)])
    assert count(config).gflops_true - count(config).gflops == pytest.approx(further / 1e9)


def test_parameters_are_all_but_the_position_embedding() -> None:
    config = DenoiserConfig((8, 8, 3), 2, 64, 4, 4, ((4, 4, 6),), labels=3)
    denoiser = Denoiser(config)
    total = sum(p.numel() for p in denoiser.parameters())
    assert count(config).parameters == total - denoiser.pos_embed.numel()


def test_conditioning_on_all_levels_adds_a_stack_a_site() -> None:
    """denoiser.md's z_1 given z_2, and what z_3 and z_4 add: their stacks of 8 sites, and nothing else."""
    markov = DenoiserConfig((8, 8, 64), 2, 512, 12, 8, ((6, 6, 56),))
    every = replace(markov, condition_shapes=((6, 6, 56), (4, 4, 48), (2, 2, 40)))
    added = count(every) - count(markov)
    # z_3: 4 to 8 by ConvT(48, 64, k4, s2, p1); z_4: 2 to 4 by ConvT(40, 512, k2, s2)
    assert added.parameters == 8 * ((48 * 64 * 16 + 64) + (64 * 512 * 9 + 512) + (40 * 512 * 4 + 512))
    assert growth([markov], [every]).parameters == added.parameters


def test_info_shows_the_paper_beside(tmp_path: Path) -> None:
    path = tmp_path / "coco.yaml"
    path.write_text(
        "features: {out: stores, encoder: clip, z0: 'vae:256'}\n"
        "levels: [{shape: 32x32x4}, {shape: 8x8x64, sigma: 1}, {shape: 6x6x56, sigma: 0.5}]\n"
    )
    text = show(load_recipe(path))
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert lines["2"] == ["2", "z_1", "8x8x64", "58.059M", "8.510", "8.115", "58.06M", "8.54"]
    assert lines["3"][3] == "59.586M"
    assert "the paper's COCO" in text


def test_info_tells_stores_and_denoisers(experiment: Callable[..., Path]) -> None:
    recipe = load_recipe(experiment(rows=12))
    (recipe.root / "stores/toy/tiny/2x2x4.seal.json").unlink()
    text = show(recipe)
    assert "8x8x3.zarr: 12 rows, 1 view(s)" in text
    assert "2x2x4.zarr is unfinished" in text
    assert text.count("not trained") == 3
    assert "paper" not in text.split("L ")[1]
