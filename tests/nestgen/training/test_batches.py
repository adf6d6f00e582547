"""Batches are functions of (seed, step, sample), and a row's levels, flips and labels stay together."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nestgen.errors import UserError
from nestgen.recipe.recipe import Recipe, load_recipe
from nestgen.stores.latent import to_latent
from nestgen.training.batches import Batch, make_batch, map_tensors, open_training_data, prefetch
from nestgen.training.order import rows_of_samples

Experiment = Callable[..., Path]


def same(one: Batch, other: Batch) -> bool:
    """Bitwise."""
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def tensors(batch: Batch) -> list[Any]:
    """All of a batch."""
    found: list[Any] = []
    map_tensors(batch, found.append)  # type: ignore[arg-type]
    return found


def joined(parts: list[Batch]) -> Batch:
    """The batch whose shares these are."""
    together = map(torch.cat, zip(*map(tensors, parts), strict=True))
    return map_tensors(parts[0], lambda tensor: next(together))  # type: ignore[no-any-return]


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_processes_share_the_batch_of_one(experiment: Experiment, processes: int) -> None:
    recipe = experiment(
        views=2, classes=3, moments=True, denoiser={"size": "nano", "labels": 3}, training={"batch": 12}
    )
    data = open_training_data(load_recipe(recipe), 0)
    for step in (0, 7):
        whole = make_batch(data, step)
        assert same(whole, joined([make_batch(data, step, p, processes) for p in range(processes)]))
        assert same(whole, make_batch(open_training_data(load_recipe(recipe), 0), step))
        assert not same(whole, make_batch(data, step + 1))


def test_another_seed_or_level_is_another_batch(experiment: Experiment) -> None:
    recipe = load_recipe(experiment(training={"batch": 8}))
    data = open_training_data(recipe, 0)
    other = replace(data, recipe=recipe.model_copy(update={"seed": 1}))
    assert not torch.equal(make_batch(data, 0).eps_BCHW, make_batch(other, 0).eps_BCHW)
    assert not torch.equal(make_batch(data, 0).z_BCHW, make_batch(other, 0).z_BCHW)
    assert not torch.equal(make_batch(data, 0).at.t_B, make_batch(open_training_data(recipe, 1), 0).at.t_B)


@given(st.integers(1, 30), st.integers(1, 50), st.integers(0, 5))
def test_every_epoch_is_a_permutation(rows: int, batch: int, seed: int) -> None:
    order = np.concatenate(
        [
            rows_of_samples(seed, rows, np.arange(step * batch, (step + 1) * batch))
            for step in range(3 * rows // batch + 1)
        ]
    )
    for epoch in range(len(order) // rows):
        assert sorted(order[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    if rows > 10 and len(order) >= 2 * rows:
        assert list(order[:rows]) != list(order[rows : 2 * rows])


def test_levels_flips_and_labels_of_a_row_stay_together(experiment: Experiment) -> None:
    """Each drawn z_0 is found among the stored ones; its z_1 and label must be of the same row and view."""
    recipe = load_recipe(
        experiment(
            levels=({"shape": "8x8x3", "patch": 4}, {"shape": "4x4x6"}),
            views=2,
            classes=4,
            denoiser={"size": "nano", "labels": 4},
            training={"batch": 64, "label_drop": 0},
        )
    )
    data = open_training_data(recipe, 0)
    stored_0, stored_1 = data.stores.z.load().astype(np.float32), data.stores.above[0].load().astype(np.float32)
    batch = make_batch(data, 3)
    assert batch.label_B is not None
    views = []
    for z, condition, label in zip(batch.z_BCHW, batch.conditions[0], batch.label_B):
        matches = np.argwhere((stored_0 == z.permute(1, 2, 0).numpy()).all((2, 3, 4)))
        assert len(matches) == 1
        row, view = matches[0]
        np.testing.assert_array_equal(condition.permute(1, 2, 0).numpy(), stored_1[row, view])
        assert label == row % 4
        views.append(view)
    assert 16 < sum(views) < 48


def test_rates_and_condition_noise(experiment: Experiment) -> None:
    recipe = load_recipe(
        experiment(
            classes=2,
            denoiser={"size": "nano", "labels": 2},
            training={"batch": 4000, "condition_drop": 0.3, "label_drop": 0.2},
        )
    )
    data = open_training_data(recipe, 0)
    batch = make_batch(data, 0)
    assert batch.keep_B is not None
    assert batch.label_B is not None
    assert batch.keep_B.float().mean() == pytest.approx(0.7, abs=0.03)
    assert (batch.label_B == 2).float().mean() == pytest.approx(0.2, abs=0.03)
    assert batch.at.t_B.mean() == pytest.approx(0.5, abs=0.02)
    rows = rows_of_samples(0, 40, np.arange(4000))
    clean = to_latent(data.stores.above[0].read(rows, np.zeros_like(rows)), None, None)
    added = batch.conditions[0] - clean
    assert added.std() == pytest.approx(0.5, rel=0.02)  # sigma of z_1 in the recipe
    # draws of one sample are independent of each other
    draws = torch.stack(
        [batch.keep_B.double(), (batch.label_B == 2).double(), batch.at.t_B, added[:, 0, 0, 0].double()]
    )
    assert (torch.corrcoef(draws) - torch.eye(4)).abs().max() < 0.06


def test_conditions_of_all_levels_have_sigmas_of_their_own(experiment: Experiment) -> None:
    recipe = load_recipe(
        experiment(
            levels=({"shape": "8x8x3"}, {"shape": "4x4x6", "sigma": [0.2, 1.2]}, {"shape": "2x2x4", "sigma": 0.5}),
            denoiser={"size": "nano", "condition_on": "all", "sigma_told": True},
            training={"batch": 4000},
        )
    )
    data = open_training_data(recipe, 0)
    batch = make_batch(data, 0)
    assert batch.sigma_BK is not None
    rows, (ranged, fixed) = rows_of_samples(0, 40, np.arange(4000)), batch.sigma_BK.T
    assert (fixed == 0.5).all()
    assert (ranged.min().item(), ranged.max().item()) == pytest.approx((0.2, 1.2), abs=0.01)
    assert ranged.mean() == pytest.approx(0.7, abs=0.02)
    noises = []
    for store, condition_BCHW, sigma_B in zip(data.stores.above, batch.conditions, batch.sigma_BK.T, strict=True):
        added = condition_BCHW - to_latent(store.read(rows, np.zeros_like(rows)), None, None)
        noises.append(added / sigma_B[:, None, None, None])  # the noise itself is standard normal at every sigma
        assert noises[-1].std() == pytest.approx(1, rel=0.02)
    assert noises[0][ranged.argsort()[:400]].std() == pytest.approx(1, rel=0.05)
    first = torch.stack([noise[:, 0, 0, 0] for noise in noises])
    assert abs(torch.corrcoef(first)[0, 1]) < 0.06


def with_captions(experiment: Experiment, store_writer: Callable[..., Path], **training: object) -> Recipe:
    """40 pictures, the r-th with r % 4 captions; the embedding of text row i is i / 64 in all its values."""
    recipe = load_recipe(
        experiment(denoiser={"size": "nano", "text": "3x6"}, training={"batch": 2000, "text_drop": 0.25, **training})
    )
    counts = np.arange(40) % 4
    offsets = np.concatenate([[1], 1 + np.cumsum(counts)]).astype("<i8")
    values = np.broadcast_to(np.arange(offsets[-1])[:, None, None] / 64, (offsets[-1], 3, 6)).astype("<f2")
    keys, folder = [f"picture-{row}" for row in range(40)], recipe.root / "stores/toy/text"
    store_writer(folder / "3x6.zarr", values, kind="text", keys=keys, block_rows=16, null_row=0)
    store_writer(folder / "offsets.zarr", offsets, kind="offsets", keys=keys, block_rows=16)
    return recipe


def test_captions_belong_to_their_row(experiment: Experiment, store_writer: Callable[..., Path]) -> None:
    data = open_training_data(with_captions(experiment, store_writer), 0)
    batch, again = make_batch(data, 1), make_batch(data, 1)
    assert batch.context_BTD is not None and again.context_BTD is not None
    assert batch.context_BTD.shape == (2000, 3, 6)
    assert torch.equal(batch.context_BTD, again.context_BTD)
    rows = rows_of_samples(0, 40, np.arange(2000, 4000))
    text_rows = (64 * batch.context_BTD[:, 0, 0]).round().long().numpy()
    offsets = np.concatenate([[1], 1 + np.cumsum(np.arange(40) % 4)])
    of_row = [set(text_rows[rows == row]) for row in range(40)]
    for row in range(40):  # all captions of the row and no other, and the empty one for what is dropped
        assert of_row[row] == {0, *range(offsets[row], offsets[row + 1])}
    captioned = text_rows[rows % 4 > 0]
    assert (captioned == 0).mean() == pytest.approx(0.25, abs=0.03)


def test_captions_that_do_not_fit_are_refused(experiment: Experiment, store_writer: Callable[..., Path]) -> None:
    recipe = with_captions(experiment, store_writer)
    folder = recipe.root / "stores/toy/text"
    shutil.rmtree(folder / "offsets.zarr")
    short = np.arange(1, 42, dtype="<i8")
    keys = [f"picture-{row}" for row in range(40)]
    store_writer(folder / "offsets.zarr", short, kind="offsets", keys=keys)
    with pytest.raises(UserError, match=r"offsets.zarr does not fit .*3x6.zarr and 40 rows.*featurize embed-text"):
        open_training_data(recipe, 0)
    wide = recipe.model_copy(update={"denoiser": recipe.denoiser.model_copy(update={"text": (77, 768)})})
    with pytest.raises(UserError, match=r"there is no store .*77x768.zarr; make it with `featurize embed-text`"):
        open_training_data(wide, 0)


def test_moments_are_sampled_anew_every_time(experiment: Experiment) -> None:
    recipe = load_recipe(experiment(levels=({"shape": "8x8x3"},), rows=1, moments=True, training={"batch": 500}))
    data = open_training_data(recipe, 0)
    mean, logvar = np.split(data.stores.z.load()[0, 0].astype(np.float32), 2, -1)
    assert (logvar == -6).all()
    for step in (0, 1):
        z_BCHW = make_batch(data, step).z_BCHW / 0.5  # the codec's scale
        torch.testing.assert_close(z_BCHW.mean(0).permute(1, 2, 0).numpy(), mean, rtol=0, atol=0.01)
        assert z_BCHW.std(0).mean() == pytest.approx(np.exp(-3), rel=0.02)
    assert not torch.equal(make_batch(data, 0).z_BCHW, make_batch(data, 1).z_BCHW)


def test_the_top_level_has_no_condition(experiment: Experiment) -> None:
    batch = make_batch(open_training_data(load_recipe(experiment()), 2), 0)
    assert batch.conditions == ()
    assert batch.keep_B is None
    assert batch.label_B is None


def test_bad_stores_are_refused(experiment: Experiment) -> None:
    recipe = load_recipe(experiment())
    (recipe.root / "stores/toy/tiny/4x4x6.seal.json").unlink()
    with pytest.raises(UserError, match="unfinished"):
        open_training_data(recipe, 0)
    open_training_data(recipe, 2)  # needs neither


def tagged(step: int) -> Any:
    """Stands for a batch."""
    return step


@given(st.integers(0, 20), st.integers(0, 20))
def test_prefetch_keeps_order(first: int, last: int) -> None:
    assert list(prefetch(tagged, first, last)) == list(range(first, last))


def test_prefetch_works_ahead_but_not_without_end() -> None:
    made: list[int] = []
    enough = threading.Event()

    def make(step: int) -> Any:
        made.append(step)
        if len(made) == 5:
            enough.set()
        return step

    batches = prefetch(make, 0, 100)
    assert next(batches) == 0  # type: ignore[comparison-overlap]
    assert enough.wait(10)  # 1, ..., 4 are prepared without being asked for
    batches.close()
    assert made == list(range(5))


def test_prefetch_raises_what_went_wrong() -> None:
    def make(step: int) -> Any:
        if step == 3:
            raise UserError("gone")
        return step

    batches = prefetch(make, 0, 10)
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="gone"):
        next(batches)
