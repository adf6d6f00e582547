"""The commands that look at stores, and how wrong command lines end."""

from __future__ import annotations

import getpass
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import webdataset
import yaml

from featurize.cli.main import commands
from featurize.cli.options import parse_model_args
from featurize.recipe import Features
from tests.featurize.conftest import MODEL, Outcome

Command = Callable[..., Outcome]


def test_info_says_what_a_root_holds(extraction: Path, featurize: Command) -> None:
    outcome = featurize("info", extraction)
    assert outcome.code == 0, outcome.err
    for words in ("60 rows", "3 classes", "two views", "base store, 60x2x4x4x48", "level, 60x2x2x2x8", "codec pixels"):
        assert words in outcome.out


def test_info_of_an_unfinished_store_says_so(extraction: Path, tmp_path: Path, featurize: Command) -> None:
    root = shutil.copytree(extraction, tmp_path / "root")
    (root / f"timm-{MODEL}" / "2x2x8.seal.json").unlink()
    assert "2x2x8.zarr: unfinished" in featurize("info", root).out


def test_ls_shows_a_damaged_seal_in_its_line(extraction: Path, tmp_path: Path, featurize: Command) -> None:
    root = shutil.copytree(extraction, tmp_path / "root")
    seal = root / f"timm-{MODEL}" / "2x2x8.seal.json"
    for content in (seal.read_text().replace('"rows": 60', '"rows": 61'), "[]"):
        seal.write_text(content)
        outcome = featurize("ls", tmp_path)
        assert outcome.code == 0, outcome.err
        states = {line.split()[0]: line for line in outcome.out.splitlines()[2:]}
        assert "damaged; see `featurize verify`" in states[f"timm-{MODEL}/2x2x8.zarr"]
        assert "sealed" in states[f"timm-{MODEL}/1x1x16.zarr"]


def test_an_empty_root_is_one_sentence(tmp_path: Path, featurize: Command) -> None:
    for arguments in (["info", tmp_path], ["knn-viz", "--stores", tmp_path]):
        outcome = featurize(*arguments)
        assert outcome.code == 1
        assert outcome.err.startswith("error: ")
        assert "is not a store root" in outcome.err


def test_scenes_are_written_as_shards(tmp_path: Path, featurize: Command) -> None:
    outcome = featurize("scenes", "--count", 5, "--size", 24, "--split", "val", "--out", tmp_path)
    assert outcome.code == 0, outcome.err
    (shard,) = tmp_path.glob("*.tar")
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False).decode("pil"))
    assert len(samples) == 5
    assert all(sample["png"].size == (24, 24) and len(sample["json"]["captions"]) >= 3 for sample in samples)


def test_scenes_are_a_source_and_tiny_an_encoder(tmp_path: Path, featurize: Command) -> None:
    arguments = ("extract", "scenes", "--limit", 20, "--encoder", "tiny", "--levels", "2x2x8", "--out", tmp_path / "s")
    outcome = featurize(*arguments)
    assert outcome.code == 0, outcome.err
    assert "20 rows from scenes" in outcome.out
    assert "captions" in outcome.out
    assert featurize("extract", "scenes", "--limit", 20, "--levels", "2x2x8", "--out", tmp_path / "s").code == 0


def test_a_wrong_command_line_exits_with_2(featurize: Command) -> None:
    for arguments in (["extract", "--levls", "2x2x8"], ["extrat"], ["extract", "--views", "3"]):
        assert featurize(*arguments).code == 2


def test_every_features_key_but_the_source_is_an_option_and_documented() -> None:
    names = {parameter.name for parameter in commands.commands["extract"].params}
    assert set(Features.model_fields) <= names
    text = (Path(__file__).parents[3] / "docs" / "recipe.md").read_text()
    assert all(f"`{key}`" in text or f"`{key}`," in text for key in Features.model_fields)


def test_the_demos_recipe_is_valid() -> None:
    recipe = yaml.safe_load((Path(__file__).parents[3] / "pipelines" / "recipes" / "demo.yaml").read_text())
    Features(**recipe["features"])


def test_help_shows_no_values_of_pythons(featurize: Command) -> None:
    outcome = featurize("extract", "--help")
    assert outcome.code == 0
    assert "Undefined" not in outcome.out and "None" not in outcome.out


def test_errors_name_options_as_they_were_given(tmp_path: Path, featurize: Command) -> None:
    outcome = featurize("extract", "scenes", "--out", tmp_path / "s", "--max-bad", "many")
    assert (outcome.code, outcome.err) == (
        1, "error: --max-bad is 'many'; it must be a count like 100 or a share like 1%.\n",
    )  # fmt: skip


def test_model_arguments_are_read_as_yaml() -> None:
    assert parse_model_args("eps=1e-5,size=64,name=no,pool=") == {"eps": 1e-5, "size": 64, "name": "no", "pool": None}
    assert parse_model_args("{eps: 1e-5, on: no}") == {"eps": 1e-5, "on": "no"}


def test_a_user_without_a_name_has_one_for_torch(monkeypatch: pytest.MonkeyPatch, featurize: Command) -> None:
    """In a container whose user has no passwd entry, importing torch's compiler would fail."""

    def no_entry(_: int) -> None:
        raise KeyError("getpwuid(): uid not found")

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", no_entry)
    monkeypatch.setenv("LOGNAME", "")  # so that what is set is removed again
    assert featurize("--help").code == 0
    assert getpass.getuser() == str(os.getuid())


@pytest.mark.parametrize(
    ("raised", "sentence"),
    [
        (MemoryError(), "error: The memory of the machine is full; give fewer --workers, or choose"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "error: The memory of the machine is full"),
        (torch.OutOfMemoryError("CUDA out of memory"), "error: The memory of the GPU is full; give fewer --workers"),
    ],
)
def test_memory_that_runs_out_is_one_sentence(
    raised: Exception, sentence: str, monkeypatch: pytest.MonkeyPatch, featurize: Command
) -> None:
    def full() -> None:
        raise raised

    monkeypatch.setattr(commands.commands["encoders"], "callback", full)
    outcome = featurize("encoders")
    assert (outcome.code, outcome.err.count("\n")) == (1, 1)
    assert outcome.err.startswith(sentence)
