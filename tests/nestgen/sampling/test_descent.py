"""The descent in one call, and that it is the same however it is cut: the command takes a level of a block at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nestgen.errors import UserError
from nestgen.recipe.recipe import Recipe, load_recipe
from nestgen.sampling.conditions import ImageConditions, Request, open_conditions
from nestgen.sampling.descent import sample_images
from nestgen.sampling.frozen import FrozenSource
from nestgen.sampling.trained import load_samplers
from nestgen.stores.store import open_store
from tests.nestgen.samples import levels, sample_folder

CPU = torch.device("cpu")


@pytest.fixture
def recipe(trained: Callable[..., Path]) -> Recipe:
    return load_recipe(trained(classes=4, denoiser={"size": "nano", "labels": 4}, sampling={"steps": 2}))


@pytest.mark.parametrize("kind", ["free", "one class", "image 0", "one row", "row of each"])
def test_one_call_is_what_the_command_writes(recipe: Recipe, tmp_path: Path, kind: str) -> None:
    root = tmp_path / "stores" / "toy"
    frozen = {"image 0": FrozenSource(1), "one row": FrozenSource(2, root, 9), "row of each": FrozenSource(1, root)}
    request = Request(5, 3, 5, label=2 if kind == "one class" else None, frozen=frozen.get(kind))
    samplers = load_samplers(recipe, CPU)
    z = sample_images(samplers, range(5), open_conditions(recipe, samplers, request))
    out = sample_folder(recipe, tmp_path / "s", 5, 3, 5, label=request.label, frozen=request.frozen)
    for level, written in enumerate(levels(out)):
        np.testing.assert_array_equal(z[level].permute(0, 2, 3, 1), written)


def test_a_level_alone_is_that_of_the_whole_descent(recipe: Recipe) -> None:
    samplers, conditions = load_samplers(recipe, CPU), ImageConditions(3, classes=4)
    z = sample_images(samplers, range(5), conditions)
    alone = sample_images([samplers[1]], range(5), conditions, {2: z[2]})
    torch.testing.assert_close(alone[1], z[1], rtol=0, atol=0)
    with pytest.raises(AssertionError, match="z_1 is neither frozen nor sampled"):
        sample_images([samplers[0]], range(5), conditions)


def test_classes_are_those_of_rows_where_images_are_frozen_to_them(recipe: Recipe, tmp_path: Path) -> None:
    root, samplers = tmp_path / "stores" / "toy", load_samplers(recipe, CPU)
    own = open_store(root / "labels.zarr").load()

    def labels(frozen: FrozenSource, label: int | None = None) -> list[int]:
        label_B = open_conditions(recipe, samplers, Request(3, 0, 3, label, frozen)).labels([0, 1, 2])
        assert label_B is not None
        return label_B.tolist()

    assert labels(FrozenSource(1, root)) == own[:3].tolist()
    assert labels(FrozenSource(2, root, 7)) == [own[7]] * 3
    assert labels(FrozenSource(2, root, 7), 2) == [2, 2, 2]
    assert len(set(labels(FrozenSource(1)))) == 1
    few = ImageConditions(0, 2, None, FrozenSource(1, root), {1: open_store(root / "tiny" / "4x4x6.zarr")})
    label_B = few.labels(range(4))  # of which two are classes that the denoisers do not know
    assert label_B is not None and own[:4].tolist() == [0, 1, 2, 3] and label_B.tolist() == [0, 1, 2, 2]
    with pytest.raises(UserError, match="no label 4: the denoisers have classes 0 to 3"):
        labels(FrozenSource(1), 4)
