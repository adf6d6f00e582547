"""The fit of a basis: its parts, and the variance that it may lose."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from featurize.errors import UserError
from featurize.extraction import block, fit
from featurize.extraction.extract import extract
from featurize.extraction.fit import check_tolerance
from featurize.recipe import read_request
from featurize.store.metadata import ArraySpec
from tests.featurize.conftest import MODEL, options

ENCODER = f"timm-{MODEL}"


def test_workers_that_write_to_other_disks_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, times = fit._write_part, iter(range(2))

    def write_elsewhere(task: fit.FitTask) -> block.Done:
        next(times)  # a third time would be for ever
        return write(replace(task, part=tmp_path / "elsewhere" / task.part.name))

    monkeypatch.setattr(fit, "_write_part", write_elsewhere)
    wanted = {"source": "scenes:16", "limit": 4, "encoder": "pixels", "z0": "pixels:8", "out": str(tmp_path / "root")}
    with pytest.raises(
        UserError, match=r"moments\.safetensors was written by a worker and is not here; every worker must"
    ):
        extract(read_request(None, wanted, "1x1x1"), workers=0, scheduler=None)


@pytest.mark.parametrize(("lost", "accepted"), [(0.0123, 0.013), (1.234e-7, 1.3e-7)])
def test_the_tolerance_that_an_error_names_is_enough(lost: float, accepted: float) -> None:
    base = ArraySpec(Path("s/tiny/base.zarr"), "base", (1,), "float16", 1, "", {"basis": {"rows": 1}}, {})
    measured = {"basis_drift": {"lost_variance": lost, "largest_angle_degrees": 1.0}}
    with pytest.raises(UserError, match=rf"--basis-tolerance {accepted:g}, or"):
        check_tolerance(measured, base, 0.0)
    check_tolerance(measured, base, accepted)


def test_a_basis_that_drifted_too_far_stops_the_run_and_is_accepted_when_asked(
    picture_folder: Path, vit_weights: Path, tmp_path: Path, featurize: Callable
) -> None:
    request = options(
        picture_folder, vit_weights, tmp_path / "out", basis_rows=1, base_channels=4, basis_tolerance=1e-4
    )
    with pytest.raises(UserError, match=r"fitted on 1 pictures, loses .*--basis-tolerance 0.01%.*is kept") as stopped:
        extract(read_request(None, request, "1x1x4"), workers=0, scheduler=None)
    assert not (tmp_path / "out" / ENCODER / "base.seal.json").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("base.zarr/c/**/0")}
    advice = r"accept it by `featurize extract` with --basis-tolerance (\S+),"
    accepted = float(re.findall(advice, str(stopped.value))[0])
    extract(read_request(None, request | {"basis_tolerance": accepted}, "1x1x4"), workers=0, scheduler=None)
    del request["basis_rows"]  # as in a store of an earlier version, whose default was another
    extract(read_request(None, request, "1x1x4,1x1x2"), workers=0, scheduler=None)
    assert before
    assert {path: path.stat().st_mtime_ns for path in before} == before
    seal = json.loads((tmp_path / "out" / ENCODER / "base.seal.json").read_text())
    assert 1e-4 < seal["basis_drift"]["lost_variance"] <= accepted < 0.9
    assert seal["features"]["tokens"] == 60 * 2 * 16
    assert 1 < seal["features"]["effective_rank"] < 48
    assert 0 < seal["features"]["outlier_share"] < 1
    (tmp_path / "out" / ENCODER / "base.seal.json").unlink()
    assert re.findall(advice, featurize("repair", tmp_path / "out").err) == [f"{accepted:g}"]  # it has no such option
    extract(read_request(None, request | {"basis_tolerance": accepted}, "1x1x4"), workers=0, scheduler=None)
