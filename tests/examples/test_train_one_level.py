"""The example still runs with nestgen as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from benchmarks.training_feed import write_store
from examples.train_one_level import main

CODEC = {"name": "pixels", "size": 8, "moments": False, "scale": 1.0}


@pytest.mark.parametrize("conditioned", [True, False])
def test_it_trains_samples_and_writes_a_sheet(conditioned: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, shape, attributes in (("z0", [8, 8, 3], {"codec": CODEC}), ("z1", [2, 2, 8], {})):
        values = rng.uniform(-1, 1, (16, 1, *shape)).astype(np.float32)
        write_store(tmp_path / f"{name}.zarr", values, 16, latent_shape=shape, **attributes)
    condition = ["--condition", str(tmp_path / "z1.zarr")] if conditioned else []
    outcome = CliRunner().invoke(
        main,
        [
            str(tmp_path / "z0.zarr"),
            *condition,
            "--steps",
            "3",
            "--batch",
            "4",
            "--count",
            "2",
            "--out",
            str(tmp_path / "s.png"),
        ],
        catch_exceptions=False,
    )
    assert outcome.exit_code == 0, outcome.output
    assert "step 3: loss" in outcome.output
    assert Image.open(tmp_path / "s.png").size[1] == 2 * 96 + 3 * 4  # two rows of images, enlarged from 8 to 96
