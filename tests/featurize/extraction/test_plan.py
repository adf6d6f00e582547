from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fsspec
import pytest

from featurize.cli.main import commands
from featurize.errors import UserError
from featurize.execution.decoders import decoded
from featurize.extraction import loader, plan
from featurize.extraction.extract import extract
from featurize.extraction.plan import estimate, stores_of
from featurize.recipe import Request, read_request
from featurize.store.read import open_array

RECIPES = Path(__file__).parents[3] / "pipelines" / "recipes"


def test_the_stores_are_those_an_extraction_leaves(tmp_path: Path) -> None:
    options = {"source": "scenes:16", "out": str(tmp_path / "s"), "limit": 20, "z0": "vae:16", "z0_weights": "tiny"}
    request = read_request(None, options, "4x4x8,2x2x4")
    planned = stores_of(request, 20, 0)
    assert "20 pictures of scenes:16" in estimate(request, None, 10.0, False)
    extract(request, 0, None)
    for store in planned:
        array = open_array(tmp_path / "s" / store.name)
        assert (array.shape, array.nbytes) == (store.shape, store.bytes)
    again = stores_of(request, 20, 0)  # from the cards of the run
    assert again == planned


def test_a_paper_recipe_is_planned_without_its_data_or_weights() -> None:
    request = read_request(RECIPES / "imagenet100-uncond.yaml", {}, None)
    text = estimate(request, 127_000, 100.0, False)
    assert "127000x2x14x14x64" in text
    assert "127000x2x32x32x8" in text
    assert f"hours: {(127_000 + 8_192) / 100 / 3600:.3g} at 100 pictures/s" in text
    assert "give --rate" in estimate(request, 127_000, None, False)
    with pytest.raises(UserError, match="--measure needs the pictures"):
        estimate(request, 127_000, None, True)


PUBLISHED = {"coco": "82,783", "imagenet100": "128,117", "imagenet": "1,281,167"}


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_is_planned_where_there_is_no_data(file: Path) -> None:
    request, data = read_request(file, {}, None), file.stem.split("-")[0]
    if "photos" in file.stem:
        with pytest.raises(UserError, match=r"is not there; .* give --rows N"):
            estimate(request, None, 300.0, False)
        return
    text = estimate(request, None, 300.0, False)
    listed = PUBLISHED.get(data) or f"{request.features.limit:,}"
    assert text.startswith(f"{listed} pictures of ")
    assert ("so many are published" in text) == (data in PUBLISHED)
    rows = int(text.split()[0].replace(",", ""))
    # Half-floats: the base store, each level, z_0's moments.
    [base] = [store for store in stores_of(request, rows, 0) if store.name.endswith("base.zarr")]
    assert base.shape[-1] == max(request.features.base_channels, *(channels for *_, channels in request.levels))
    assert base.bytes > rows * request.features.views * 2 * request.levels[0][0] * request.levels[0][1]
    assert ("text/77x768.zarr" in text) == (request.features.text is not None)


def test_a_trial_measures_the_extraction_itself_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "TRIAL", 0.001)
    options = {"source": "scenes:16", "out": str(tmp_path / "s"), "limit": 100, "encoder": "pixels", "z0": "pixels:16"}
    request = read_request(None, options, "2x2x4")
    text = estimate(request, None, None, True, workers=0)
    assert re.search(
        r"measured with 1 worker\(s\) on 64 pictures: [\d.e+]+ pictures/s, all stages together; \d+\.\d s to start",
        text,
    )
    assert re.search(r"hours: [\d.e-]+ \(100 pictures are encoded once more, for the basis: [\d.e-]+\)", text)
    assert not list(tmp_path.iterdir())
    no_weights = read_request(None, options | {"encoder": "clip", "weights": str(tmp_path / "none.pt")}, "2x2x4")
    with pytest.raises(UserError, match=r"none\.pt"):
        plan.measured_speed(no_weights, 100, 0, None)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(plan, "TRIAL", 1000.0)
    assert "worker(s) on 100 pictures" in estimate(request, None, None, True, workers=0)  # more are not there


def test_a_clusters_trial_of_a_bucket_is_made_in_it_and_leaves_nothing(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def extract_here(trial: Request, workers: int | None, scheduler: str, decoders: None) -> None:
        made.append(trial.features.out)
        extract(trial, workers=0, scheduler=None)

    monkeypatch.setattr(plan, "extract", extract_here)
    options = {"source": "scenes:16", "out": f"{bucket}/s", "limit": 8, "encoder": "pixels", "z0": "pixels:16"}
    assert "on 8 pictures" in estimate(read_request(None, options, "2x2x4"), None, None, True, scheduler="tcp://x")
    assert made[0].startswith(f"{bucket}/.featurize-plan-")
    assert not fsspec.filesystem("s3", skip_instance_cache=True).find(bucket)


def test_a_trial_has_the_decoders_that_will_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(loader, "decoded", lambda *job: asked.append(job[2]) or decoded(*job))
    options = {"source": "scenes:16", "out": str(tmp_path / "s"), "limit": 20, "encoder": "pixels", "z0": "pixels:16"}
    text = estimate(read_request(None, options, "2x2x4"), None, None, True, workers=0, decoders=1)
    assert "worker(s) on 20 pictures" in text and set(asked) == {1}


@pytest.mark.parametrize("one_pass", [True, False])
def test_hours_come_from_the_log_of_a_trial(one_pass: bool, tmp_path: Path) -> None:
    """Two workers, whose first blocks are slow: 2 s to start, a basis part of 4 s, blocks of 32 pictures, 6 s of all else."""
    base = datetime(2026, 1, 1, tzinfo=UTC)

    def event(name: str, second: float, **facts: object) -> str:
        return json.dumps({"time": (base + timedelta(seconds=second)).isoformat(), "event": name, **facts}) + "\n"

    def block(end: float, took: float) -> str:
        return event("block", end, pictures=32, seconds={"read": took / 4, "encode": 3 * took / 4})

    lines = [
        event("start", 0.0),
        event("ledger", 4.0 if not one_pass else 39.0),
        event("basis part", 8.0, pictures=16, seconds={"encode": 4.0}),
        *(block(8 + end, took) for end, took in [(15, 15), (16, 16), (21, 6), (22, 6), (27, 6), (28, 6)]),
        event("end", 38.0 if not one_pass else 40.0),
    ]
    (tmp_path / "log").write_text("".join(sorted(lines, key=lambda line: json.loads(line)["time"])))
    speed = plan._speed_of(tmp_path / "log", 192, wall=42.0)
    assert (speed.workers, speed.pictures, speed.lasted) == (2, 192, 12.0)
    assert speed.start == pytest.approx(4.0 if not one_pass else 2.0)
    assert speed.block == pytest.approx(12 / 128)
    assert speed.rest == pytest.approx((6 if not one_pass else 8) / 192)
    assert speed.fit == pytest.approx(4 / 16 / 2)
    smaller = replace(speed, pictures=64, start=9.0, rest=3.0 / 64)
    both = speed.after(smaller)
    assert both.rest * 192 + both.once == pytest.approx(speed.rest * 192)
    assert both.rest * 64 + both.once == pytest.approx(3.0)
    assert both.start == 9.0 and both.seconds(1000, 0) < replace(speed, start=9.0).seconds(1000, 0)
    whole = speed.start + 1000 * (speed.block + speed.rest) + 100 * speed.fit
    assert speed.seconds(1000, 100) == pytest.approx(whole)


def test_who_measures_is_said_with_measure_only(tmp_path: Path) -> None:
    from click.testing import CliRunner

    (tmp_path / "r.yaml").write_text("features: {source: scenes, out: s, limit: 8}\nlevels: [{shape: 32x32x3}]\n")
    for option in ("--workers", "--decoders"):
        ran = CliRunner().invoke(commands, ["plan", str(tmp_path / "r.yaml"), option, "2"])
        assert isinstance(ran.exception, UserError) and "give --measure too" in str(ran.exception)
