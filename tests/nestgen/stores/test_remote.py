"""Stores behind an address: the same batches as from the same local store, each block fetched once an epoch."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from upath import UPath

from nestgen.cli.main import main
from nestgen.errors import UserError
from nestgen.files import read_json
from nestgen.recipe.locations import resolve_path, run_dir
from nestgen.recipe.recipe import Recipe, load_recipe
from nestgen.stores import remote
from nestgen.stores.store import open_store
from nestgen.training.batches import make_batch, open_training_data
from nestgen.training.order import epoch_order, rows_of_samples
from nestgen.training.train import train

Reads = Counter[str]
Upload = Callable[[Path], str]


@pytest.fixture
def memory() -> Iterator[Upload]:
    """Copies a store root to memory://; gives its address."""
    files = fsspec.filesystem("memory")

    def upload(root: Path) -> str:
        for file in root.rglob("*"):
            if file.is_file():
                files.pipe(f"/bucket/toy/{file.relative_to(root)}", file.read_bytes())
        return "memory://bucket/toy"

    yield upload
    files.store.clear()
    files.pseudo_dirs[:] = [""]


@pytest.fixture
def there(experiment: Callable[..., Path], memory: Upload, tmp_path: Path) -> Callable[..., tuple[Recipe, Recipe]]:
    """The recipe of a local store root, and that of its copy at memory://."""

    def write(**training: object) -> tuple[Recipe, Recipe]:
        shutil.rmtree(tmp_path / "stores", ignore_errors=True)
        local = experiment(
            views=2, classes=3, block_rows=4, denoiser={"size": "nano", "labels": 3}, training={"batch": 6, **training}
        )
        recipe = yaml.safe_load(local.read_text())
        recipe["features"]["out"] = memory(local.parent / "stores/toy")
        far = local.with_name("far.yaml")
        far.write_text(yaml.safe_dump({**recipe, "name": "far"}))
        return load_recipe(local), load_recipe(far)

    return write


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """How often each file was read."""
    counted: Reads = Counter()
    real = remote.read

    def read(path: Path | UPath) -> bytes:
        counted[str(path)] += 1
        return real(path)

    monkeypatch.setattr(remote, "read", read)
    return counted


def test_what_fits_is_read_once(there: Callable[..., tuple[Recipe, Recipe]], reads: Reads) -> None:
    here, far = there()
    local, data = open_training_data(here, 0), open_training_data(far, 0)
    assert (local.read_from, data.read_from) == ("memory", "memory")
    for step in (0, 9):
        one, other = make_batch(local, step), make_batch(data, step)
        assert torch.equal(one.z_BCHW, other.z_BCHW)
        assert torch.equal(one.conditions[0], other.conditions[0])
        assert one.label_B is not None and other.label_B is not None
        assert torch.equal(one.label_B, other.label_B)
    assert max(count for name, count in reads.items() if "/c/" in name) == 1


def test_what_does_not_is_read_block_by_block(
    there: Callable[..., tuple[Recipe, Recipe]], reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nestgen.training.batches.MEMORY_SHARE", 0.0)
    here, far = there(shuffle=12)
    local, data = open_training_data(here, 0), open_training_data(far, 0)
    assert (local.read_from, data.read_from) == ("memory maps", "remote storage")
    for step in range(13):  # two epochs of 40 rows, less two
        one, other = make_batch(local, step), make_batch(data, step)
        assert torch.equal(one.z_BCHW, other.z_BCHW)
        assert torch.equal(one.conditions[0], other.conditions[0])
    counts = [count for name, count in reads.items() if "/c/" in name and "labels" not in name]
    assert len(counts) == 20  # ten blocks of z_0 and of z_1
    assert max(counts) <= 3  # twice, and once more where the third epoch is being fetched
    with pytest.raises(UserError, match=r"is remote and too large for memory.* set training\.shuffle"):
        open_training_data(there()[1], 0)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 30), st.integers(0, 3))
def test_a_buffer_shuffles_every_row_once(rows: int, block: int, shuffle: int, epoch: int) -> None:
    order = epoch_order(0, rows, epoch, shuffle, block)
    assert sorted(order.rows) == list(range(rows))
    assert sorted(np.concatenate(order.groups)) == list(range(-(-rows // block)))
    first = 0
    for group, end in zip(order.groups, order.ends, strict=True):
        assert set(order.rows[first:end] // block) == set(group)
        assert len(group) <= max(1, shuffle // block)
        first = end
    samples = np.arange(epoch * rows, (epoch + 1) * rows)
    np.testing.assert_array_equal(rows_of_samples(0, rows, samples, shuffle, block), order.rows)


def test_a_training_from_afar(there: Callable[..., tuple[Recipe, Recipe]]) -> None:
    options = {"steps": 3, "warmup": 1, "preview": 0}
    here, far = there(**options)
    for recipe in (here, far):
        train(recipe, 1)
    one, other = (run_dir(recipe, 1) / "checkpoints/00000003/denoiser.safetensors" for recipe in (here, far))
    assert one.read_bytes() == other.read_bytes()


def test_commands_that_look_at_real_images(
    trained: Callable[..., Path],
    memory: Upload,
    store_writer: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An address, in the recipe or on the command line, gives what the same stores give here."""
    here = trained(rows=12, sampling={"steps": 1})
    features = {"kind": "level", "latent_shape": [1, 1, 3], "mean": [0.0] * 3, "std": [1.0] * 3}
    values, keys = np.random.default_rng(0).normal(size=(12, 1, 1, 1, 3)), [f"picture-{row}" for row in range(12)]
    store_writer(tmp_path / "stores/toy/tiny/1x1x3.zarr", values.astype("<f2"), keys=keys, **features)
    far = here.with_name("far.yaml")
    far.write_text(here.read_text().replace("out: stores/toy", f"out: {memory(tmp_path / 'stores/toy')}"))
    monkeypatch.chdir(tmp_path)

    def made(file: Path, root: str, to: str) -> dict[str, bytes]:
        for command in (
            f"sample --count 12 --out {to}/free",
            f"sample --count 12 --out {to}/like --like each",
            f"sample --count 3 --out {to}/row --like 7 --store {root}",
            f"evaluate --samples {to}/like --samples-store {root} --level-shape 1x1x3",
            f"diagnose --samples {to}/free --reference {root} --out {to}/diagnosis.png",
            f"nearest --samples {to}/free --out {to}/nearest.png",
            f"decode --count 3 --out {to}/decoded",
            f"hierarchy --like 3 --store {root} --columns 2 --out {to}/hierarchy.png",
        ):
            result = CliRunner().invoke(main, [*command.split(), "--recipe", file.name])
            assert result.exit_code == 0, (command, result.output)
        found = {str(one.relative_to(to)): one.read_bytes() for one in Path(to).rglob("*.png")}
        for name in ("like/evaluation.json", "diagnosis.json", "nearest.json"):
            text = json.dumps(read_json(Path(to) / name)).replace(root, "ROOT")
            found[name] = text.replace(f"{tmp_path}/ROOT", "ROOT").encode()
        return found

    local, remote = made(here, "stores/toy", "a"), made(far, "memory://bucket/toy", "b")
    assert local.keys() == remote.keys()
    for name, content in local.items():
        assert remote[name] == content, name


def test_a_training_from_a_bucket(experiment: Callable[..., Path], bucket: str) -> None:
    """From S3's own protocol: what is read is what is here, and a training ends in the same weights."""
    file = experiment(training={"batch": 8, "steps": 2, "warmup": 1, "preview": 0})
    here = load_recipe(file)
    fsspec.filesystem("s3").put(str(file.parent / "stores/toy"), f"{bucket}/toy", recursive=True)
    document = yaml.safe_load(file.read_text())
    document["features"]["out"] = f"{bucket}/toy"
    file = file.with_name("far.yaml")
    file.write_text(yaml.safe_dump({**document, "name": "far"}))
    far = load_recipe(file)
    one, other = make_batch(open_training_data(here, 0), 1), make_batch(open_training_data(far, 0), 1)
    assert torch.equal(one.z_BCHW, other.z_BCHW)
    for recipe in (here, far):
        train(recipe, 0)
    weights = [run_dir(recipe, 0) / "checkpoints/00000002/denoiser.safetensors" for recipe in (here, far)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_read_that_the_network_failed_is_tried_again(
    there: Callable[..., tuple[Recipe, Recipe]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, far = there()
    files, waited = fsspec.filesystem("memory"), []
    monkeypatch.setattr(remote.time, "sleep", waited.append)
    fails = iter([ConnectionError("reset"), TimeoutError("slow")])
    real = type(files).cat_file

    def cat(self: object, path: str, *args: object, **kwargs: object) -> bytes:
        if (error := next(fails, None)) is not None:
            raise error
        return bytes(real(self, path, *args, **kwargs))

    monkeypatch.setattr(type(files), "cat_file", cat)
    seal = resolve_path(Path(), "memory://bucket/toy/tiny/4x4x6.seal.json")
    assert remote.read(seal).startswith(b"{")
    assert waited == [1, 2]
    fails = iter([OSError("gone")] * 9)
    with pytest.raises(OSError, match=r"memory://bucket/toy/tiny/4x4x6.seal.json cannot be read: gone"):
        remote.read(seal)
    assert far.features.out.startswith("memory://")


def test_bad_states_are_one_sentence(there: Callable[..., tuple[Recipe, Recipe]]) -> None:
    there()
    files = fsspec.filesystem("memory")
    path = resolve_path(Path(), "memory://bucket/toy/tiny/4x4x6.zarr")
    assert isinstance(path, UPath)
    files.pipe("/bucket/toy/tiny/4x4x6.zarr/c/1/0/0/0/0", b"short")
    files.rm("/bucket/toy/tiny/4x4x6.zarr/c/2/0/0/0/0")
    store = open_store(path)
    for row, says in [(4, "block 1 has 5 bytes instead of"), (8, "block 2 is missing")]:
        with pytest.raises(UserError, match=says):
            store.read(np.array([row]), np.array([0]))
    files.rm("/bucket/toy/tiny/4x4x6.seal.json")
    with pytest.raises(UserError, match="is unfinished"):
        open_store(path)
    with pytest.raises(UserError, match=r"there is no store memory://bucket/none\.zarr"):
        open_store(UPath("memory://bucket/none.zarr"))
    with pytest.raises(UserError, match=r"nosuch://a/b.zarr cannot be opened"):
        resolve_path(Path(), "nosuch://a/b.zarr")


def test_addresses_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_path(tmp_path, "stores/x") == tmp_path / "stores/x"
    assert resolve_path(tmp_path, "/abs") == Path("/abs")
    monkeypatch.setenv("HOME", "/home/me")  # where featurize, too, looks for it
    assert resolve_path(tmp_path, "~/stores") == Path("/home/me/stores")
    with pytest.raises(UserError, match="~nobody-of-this-name/x can't be found, because the home folder is not known"):
        resolve_path(tmp_path, "~nobody-of-this-name/x")
    there = resolve_path(tmp_path, "s3://bucket/a") / "b.zarr"
    assert str(there) == "s3://bucket/a/b.zarr"
    assert str(there.with_suffix(".seal.json")) == "s3://bucket/a/b.seal.json"
    assert (there.parent.name, there.stem) == ("a", "b")
