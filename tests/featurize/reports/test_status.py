"""`featurize` alone says what of a recipe's stores is there and what comes next; its help is short and has examples."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from featurize.cli.main import commands
from featurize.io.lock import root_lock
from tests.featurize.conftest import MODEL, Outcome

RECIPE = f"""
features: {{source: "folder:pictures", out: stores, encoder: "timm:{MODEL}", z0: "pixels:16", views: 2}}
levels: [{{shape: 16x16x3}}, {{shape: 2x2x8}}, {{shape: 1x1x16}}]
"""


def test_it_says_what_is_there_and_what_comes_next(
    extraction: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, featurize: Callable[..., Outcome]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert featurize().out.startswith("Usage: featurize")
    (tmp_path / "nested.yaml").write_text(RECIPE)
    before = featurize().out
    assert "images       not listed yet" in before and "\nNext: featurize extract\n" in before
    shutil.copytree(extraction, tmp_path / "stores")
    whole = featurize().out
    assert "images       60 rows, 0 refused" in whole
    assert re.search(rf"z_1 +0.0 MB in timm-{MODEL}/2x2x8.zarr", whole), whole
    assert re.search(r"z_0 +0.2 MB in pixels/16x16x3.zarr", whole), whole
    assert "\nNext: nestgen    (says where the training stands" in whole
    (tmp_path / "stores" / f"timm-{MODEL}" / "2x2x8.seal.json").unlink()
    assert "z_1          unfinished, 0 blocks are written" in (now := featurize().out)
    assert "\nNext: featurize extract\n" in now
    with root_lock(tmp_path / "stores", wait=False):
        assert "An extraction is under way" in featurize().out
    (tmp_path / "stores" / "rows.parquet").write_bytes(b"PAR1")
    assert "\nNext: featurize repair " in featurize().out


def test_an_encoder_of_the_codecs_name_is_not_z_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, featurize: Callable[..., Outcome]
) -> None:
    monkeypatch.chdir(tmp_path)
    extract = ("extract", "scenes:16", "--limit", 8, "--encoder", "pixels", "--z0", "pixels:8", "--out", "stores")
    assert featurize(*extract, "--levels", "1x1x4", "--workers", 0).code == 0
    (tmp_path / "nested.yaml").write_text("features: {out: stores, encoder: pixels, z0: 'pixels:8'}")
    assert re.search(r"z_0 +0.0 MB in pixels/8x8x3.zarr", featurize().out)


def test_the_version_is_that_of_the_package(featurize: Callable[..., Outcome]) -> None:
    from featurize import __version__

    assert featurize("--version").out == f"featurize, version {__version__}\n"


def test_first_sentences_fit_a_line_and_every_help_ends_with_an_example() -> None:
    text = CliRunner().invoke(commands, ["--help"], terminal_width=80).output
    assert "..." not in text.split("Commands:")[1]
    for name, command in commands.commands.items():
        last = (command.help or "").strip().splitlines()[-1].strip()
        assert last.startswith(f"Example: featurize {name}"), name
        words = last.removeprefix(f"Example: featurize {name}").split()
        with click.Context(command) as context:
            command.parse_args(context, words)
