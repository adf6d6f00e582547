"""`nestgen decode`: real rows as their z_0 decodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from nestgen.cli.main import main
from nestgen.images import read_images
from nestgen.recipe.locations import store_path
from nestgen.recipe.recipe import load_recipe
from nestgen.sampling.decoder import to_uint8
from nestgen.sampling.real import real_latents
from nestgen.stores.store import open_store


def test_rows_are_decoded_from_z_0(
    experiment: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(experiment(sampling={"batch": 4}))
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["decode", "--count", "6", "--out", "decoded"])
    assert done.exit_code == 0, done.output
    expected = to_uint8(real_latents(open_store(store_path(recipe, 0)), range(6), 0))
    np.testing.assert_array_equal(read_images(tmp_path / "decoded", 6), expected)
    done = CliRunner().invoke(main, ["decode", "--count", "99", "--out", "all"])
    assert done.stdout.startswith("40 images of")
    done = CliRunner().invoke(main, ["decode", "--store", "nowhere", "--out", "x"])
    assert done.exit_code == 1 and "there is no store nowhere" in done.stderr
    assert not Path("x").exists()
