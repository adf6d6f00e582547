"""Stores open when sealed and whole; every other state is one sentence that names a command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nestgen.errors import UserError
from nestgen.recipe.locations import store_path
from nestgen.recipe.recipe import load_recipe
from nestgen.stores.hierarchy import open_hierarchy, read_labels
from nestgen.stores.store import open_store

Writer = Callable[..., Path]


@given(data=st.data())
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_read_equals_zarr(data: st.DataObject, store_writer: Writer, tmp_path_factory: pytest.TempPathFactory) -> None:
    rows, views, block = (data.draw(st.integers(1, high)) for high in (20, 2, 7))
    values = np.random.default_rng(rows).normal(size=(rows, views, 2, 3, 4)).astype("<f2")
    path = store_writer(
        tmp_path_factory.mktemp("store") / "2x3x4.zarr",
        values,
        kind="level",
        keys=[str(row) for row in range(rows)],
        block_rows=block,
        latent_shape=[2, 3, 4],
    )
    store = open_store(path)
    wanted = data.draw(st.lists(st.tuples(st.integers(0, rows - 1), st.integers(0, views - 1)), max_size=30))
    r, v = np.array(wanted, np.int64).reshape(-1, 2).T
    for times in (1, 40):  # a few rows a block, and many
        many_r, many_v = np.tile(r, times), np.tile(v, times)
        np.testing.assert_array_equal(store.read(many_r, many_v), values[many_r, many_v])
    np.testing.assert_array_equal(store.load(), zarr.open_array(path, mode="r")[:])
    assert (store.rows, store.views, store.latent_shape) == (rows, views, (2, 3, 4))


def test_rows_outside_are_an_error(experiment: Writer) -> None:
    store = open_store(store_path(load_recipe(experiment(rows=10)), 1))
    for row in (-1, 10, 15):  # 15 lies in the filled-up part of the last block
        with pytest.raises(IndexError):
            store.read(np.array([row]), np.array([0]))


def test_hierarchy_opens_with_its_labels(experiment: Writer) -> None:
    recipe = load_recipe(experiment(views=2, classes=3, moments=True, denoiser={"size": "nano", "labels": 4}))
    stores = open_hierarchy(recipe)
    assert [store.latent_shape for store in stores] == [(8, 8, 3), (4, 4, 6), (2, 2, 4)]
    assert stores[0].shape == (40, 2, 8, 8, 6)
    np.testing.assert_array_equal(read_labels(recipe, stores[0]), np.arange(40) % 3)


def test_unlabelled_rows_get_the_null_class(experiment: Writer, store_writer: Writer, tmp_path: Path) -> None:
    recipe = load_recipe(experiment(rows=4, denoiser={"size": "nano", "labels": 3}))
    path = tmp_path / "stores" / "toy" / "labels.zarr"
    shutil.rmtree(path)
    labels = np.array([2, -1, 0, -1], "<i8")
    store_writer(path, labels, kind="labels", keys=[f"picture-{row}" for row in range(4)])
    assert read_labels(recipe, open_store(store_path(recipe, 0))).tolist() == [2, 3, 0, 3]


def damage_missing(path: Path) -> None:
    shutil.rmtree(path)


def damage_seal(path: Path) -> None:
    path.with_suffix(".seal.json").unlink()


def damage_seal_json(path: Path) -> None:
    path.with_suffix(".seal.json").write_text("{")


def damage_chunk_missing(path: Path) -> None:
    (path / "c/1/0/0/0/0").unlink()


def damage_chunk_short(path: Path) -> None:
    chunk = path / "c/2/0/0/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-2])


def damage_metadata(path: Path) -> None:
    (path / "zarr.json").write_text("[]")


def damage_format(path: Path) -> None:
    for file in (path / "zarr.json", path.with_suffix(".seal.json")):
        file.write_text(file.read_text().replace("nested-store/1", "nested-store/9"))


def damage_fingerprint(path: Path) -> None:
    seal = path.with_suffix(".seal.json")
    seal.write_text(json.dumps({**json.loads(seal.read_text()), "fingerprint": "0"}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_missing, "there is no store"),
        (damage_seal, "is unfinished: it has no 4x4x6.seal.json"),
        (damage_seal_json, "is damaged"),
        (damage_chunk_missing, "block 1 is missing"),
        (damage_chunk_short, "block 2 has 1534 bytes instead of 1536"),
        (damage_metadata, "is damaged"),
        (damage_format, "has format nested-store/9, and this nestgen reads nested-store/1"),
        (damage_fingerprint, "and its seal disagree"),
    ],
)
@pytest.mark.parametrize("base", [False, True])
def test_bad_states_are_one_sentence(experiment: Writer, damage: Callable[[Path], None], says: str, base: bool) -> None:
    recipe = load_recipe(experiment())
    path = store_path(recipe, 1)
    if base:
        (path.parent / "base.seal.json").write_text("{}")
        (path.parent / "base.zarr").mkdir()
        (path.parent / "base.zarr" / "zarr.json").write_text('{"attributes": {"encoder": "timm:vit"}}')
    damage(path)
    with pytest.raises(UserError) as caught:
        open_hierarchy(recipe)
    sentence = str(caught.value)
    assert says in sentence
    assert str(path) in sentence
    assert "\n" not in sentence
    advice = f"featurize levels 4x4x6 --encoder timm:vit --out {path.parent.parent}"
    assert (advice if base else "featurize extract") in sentence or "extract it again" in sentence


def test_compressed_store_is_refused(experiment: Writer) -> None:
    recipe = load_recipe(experiment())
    path = store_path(recipe, 2)
    old = zarr.open_array(path, mode="r")
    values, attributes = old[:], dict(old.attrs)
    zarr.create_array(path, data=values, chunks=old.chunks, attributes=attributes, overwrite=True)
    with pytest.raises(UserError, match="not uncompressed"):
        open_hierarchy(recipe)


def test_disagreeing_levels_are_refused(experiment: Writer, store_writer: Writer, tmp_path: Path) -> None:
    recipe = load_recipe(experiment(rows=10))
    path = store_path(recipe, 1)
    keys = [f"picture-{row}" for row in range(10)]
    cases = [
        ((10, 1, 4, 4, 6), ["other", *keys[1:]], [4, 4, 6], "are not of the same images"),
        ((9, 1, 4, 4, 6), keys[:9], [4, 4, 6], "(9 rows) are not of the same images"),
        ((10, 2, 4, 4, 6), keys, [4, 4, 6], "the same --views"),
        ((10, 1, 2, 2, 6), keys, [2, 2, 6], "holds latents of 2x2x6, but levels[1].shape"),
    ]
    for shape, those, latent, says in cases:
        shutil.rmtree(path)
        store_writer(path, np.zeros(shape, "<f2"), kind="level", keys=those, latent_shape=latent)
        with pytest.raises(UserError) as caught:
            open_hierarchy(recipe)
        assert says in str(caught.value)
    open_hierarchy(recipe, (0, 2))  # what is not asked for does not matter


def test_labels_that_do_not_fit_are_refused(experiment: Writer) -> None:
    def read(**options: object) -> None:
        recipe = load_recipe(experiment(**options))
        read_labels(recipe, open_store(store_path(recipe, 0)))

    with pytest.raises(UserError, match=r"has a class 4, but denoiser.labels of .* is 3; set it to 5 or more"):
        read(classes=5, denoiser={"labels": 3})


def test_missing_labels_are_refused(experiment: Writer) -> None:
    recipe = load_recipe(experiment(denoiser={"labels": 3}))
    with pytest.raises(UserError, match=r"has no labels; set denoiser.labels"):
        read_labels(recipe, open_store(store_path(recipe, 0)))
