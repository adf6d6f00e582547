"""Scores: what is compared with what, and what must not be compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from nestgen.cli.main import main
from nestgen.errors import UserError
from nestgen.files import read_json, write_json
from nestgen.recipe.recipe import Recipe, load_recipe
from nestgen.recipe.sections import EvaluationOptions
from nestgen.sampling.conditions import Request
from nestgen.sampling.frozen import FrozenSource
from nestgen.sampling.latents import create_latents, open_latents
from nestgen.sampling.sample import sample
from nestgen.scoring import statistics as measure
from nestgen.scoring.evaluate import References, evaluate
from nestgen.scoring.frechet import frechet_distance
from nestgen.scoring.hierarchy_sheet import SheetOptions, hierarchy_sheet
from nestgen.scoring.spaces import DIMENSIONS, pool
from nestgen.stores.hierarchy import open_hierarchy
from nestgen.stores.store import open_store

Trained = Callable[..., Path]
Writer = Callable[..., Path]


def scores(recipe: Recipe, samples: Path, **options: Any) -> dict[str, dict[str, Any]]:
    evaluate(recipe, samples, References(**({"encoder_level": "1x1x5"} | options)), samples / "card.json")
    return {score["space"]: score for score in read_json(samples / "card.json")["scores"]}


def replace_latents(samples: Path, level: int, z_NHWC: np.ndarray) -> None:
    """Puts other latents into a sample folder, as a run would have written them."""
    for record in samples.glob(f"latents/z{level}.blocks/*.json"):
        record.unlink()
    latents = create_latents(samples, level, z_NHWC.shape, 16)  # type: ignore[arg-type]
    for rows in latents.blocks():
        latents.write(rows, torch.from_numpy(z_NHWC[rows.start : rows.stop]).permute(0, 3, 1, 2))


NEIGHBOURS = ("precision", "recall", "density", "coverage")


@pytest.fixture
def recipe(trained: Trained) -> Recipe:
    return load_recipe(trained(rows=30))


@pytest.fixture
def samples(recipe: Recipe, tmp_path: Path) -> Path:
    sample(recipe, tmp_path / "samples", Request(12, 0, 12))
    return tmp_path / "samples"


def test_each_level_is_scored_against_its_training_rows(recipe: Recipe, samples: Path) -> None:
    found = scores(recipe, samples)
    assert list(found) == ["z_2", "z_1", "z_0"]
    for level, store in enumerate(open_hierarchy(recipe)):
        score = found[f"z_{level}"]
        real = store.load()[:, 0].reshape(30, -1)
        drawn = open_latents(samples, level).read_all().reshape(12, -1)
        assert score["frechet_distance"] == pytest.approx(frechet_distance(drawn, real), rel=1e-6)
        assert score["dimensions"] == real.shape[1]
        seal = json.loads(store.path.with_suffix(".seal.json").read_text())
        assert score["reference"] == {"store": str(store.path), "rows": 30, "sha256": seal["sha256"]}
        assert "floor" not in score
    card = read_json(samples / "card.json")
    assert card["samples"] == read_json(samples / "sample.json")
    assert card["versions"].keys() == {"nestgen", "numpy", "torch"}


def test_training_rows_as_samples_score_zero_and_noise_raises_it(recipe: Recipe, samples: Path) -> None:
    rng = np.random.default_rng(0)
    distances, neighbours = [], []
    for amount in (0.0, 0.3, 1.0):
        for level, store in enumerate(open_hierarchy(recipe)):
            real = store.load()[:, 0].astype(np.float32)
            replace_latents(samples, level, real + amount * rng.normal(size=real.shape).astype(np.float32))
        found = scores(recipe, samples)
        distances.append([found[f"z_{level}"]["frechet_distance"] for level in range(3)])
        neighbours.append([[found[f"z_{level}"][key] for key in NEIGHBOURS] for level in range(3)])
    assert np.abs(distances[0]).max() < 1e-5
    assert (np.diff(distances, axis=0) > 0.01).all()
    fidelity = np.array(neighbours)
    assert (fidelity[0, :, [0, 1, 3]] == 1).all()
    assert (np.diff(fidelity, axis=0) <= 0).all()
    assert (np.diff(fidelity[:, :, 2], axis=0) < 0).all()  # density


def test_a_shallower_folder_is_scored_on_its_levels(recipe: Recipe, tmp_path: Path) -> None:
    sample(recipe.depth(2), tmp_path / "two", Request(5, 0, 5))
    assert list(scores(recipe, tmp_path / "two")) == ["z_1", "z_0"]


def copy_root(recipe: Recipe, root: Path, write: Writer, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Another store root with changed values of the same attributes."""
    for store in open_hierarchy(recipe):
        values = change(store.load())
        keys = [f"other-{row}" for row in range(len(values))]
        own = ("format", "rows", "views", "block_rows", "keys_sha256", "fingerprint", "provenance", "versions")
        rest = {key: value for key, value in store.attributes.items() if key not in own}
        write(root / store.path.parent.name / store.path.name, values, keys=keys, **rest)


def test_a_reference_of_its_own_brings_a_floor(
    recipe: Recipe, samples: Path, tmp_path: Path, store_writer: Writer
) -> None:
    root = tmp_path / "stores" / "other"
    copy_root(recipe, root, store_writer, lambda values: (values[:20] * 1.5).astype("<f2"))
    found = scores(recipe, samples, reference=root)
    named = recipe.evaluation.model_copy(update={"reference": "stores/other"})
    assert scores(recipe.model_copy(update={"evaluation": named}), samples) == found
    for level, store in enumerate(open_hierarchy(recipe)):
        score, training = found[f"z_{level}"], store.load()[:, 0].reshape(30, -1)
        other = open_store(root / store.path.parent.name / store.path.name)
        real = other.load()[:, 0].reshape(20, -1)
        drawn = open_latents(samples, level).read_all().reshape(12, -1)
        assert score["frechet_distance"] == pytest.approx(frechet_distance(drawn, real), rel=1e-6)
        assert score["reference"]["rows"] == 20
        assert score["floor"]["rows"] == 12  # as many as there are samples
        assert 0 < score["floor"]["frechet_distance"] < score["frechet_distance"]
        assert score["floor"]["store"] == str(store.path)
        assert len(training) == 30


def test_moments_are_compared_as_the_denoiser_sees_them(trained: Trained, tmp_path: Path) -> None:
    """z_0's reference is scale x (mean + std noise): against latents made so by hand the distance is small."""
    recipe = load_recipe(trained(rows=400, moments=True, levels=({"shape": "4x4x2", "patch": 2},)))
    store = open_hierarchy(recipe)[0]
    mean, logvar = np.split(store.load()[:, 0].astype(np.float32), 2, axis=-1)
    noise = np.random.default_rng(0).normal(size=mean.shape)
    z_0 = (0.5 * (mean + np.exp(logvar / 2) * noise)).astype(np.float32)
    folder = tmp_path / "samples"
    level = {"shape": "4x4x2", "store_fingerprint": store.attributes["fingerprint"]}
    folder.mkdir()
    card = {"recipe": "toy", "depth": 1, "count": 400, "seed": 0, "levels": [level]}
    (folder / "sample.json").write_text(json.dumps(card))
    replace_latents(folder, 0, z_0)
    at_scale = scores(recipe, folder)["z_0"]["frechet_distance"]
    replace_latents(folder, 0, 2 * z_0)
    unscaled = scores(recipe, folder)["z_0"]["frechet_distance"]
    assert at_scale < 0.02 < 0.3 < unscaled
    # extracted again with another scale: the stored values, and their digests, are the same
    old, metadata = store.attributes["fingerprint"], store.path / "zarr.json"
    for file in (metadata, store.path.with_suffix(".seal.json"), folder / "sample.json"):
        file.write_text(file.read_text().replace(old, "f" * 64))
    metadata.write_text(metadata.read_text().replace('"scale": 0.5', '"scale": 1.0'))
    assert scores(recipe, folder)["z_0"]["frechet_distance"] == pytest.approx(4 * at_scale, rel=1e-3)


def features_root(write: Writer, root: Path, rows: int, seed: int, **attributes: Any) -> np.ndarray:
    """A root with a level 1x1x5 of features that are not white; returns them."""
    mean, std = np.arange(5.0), np.array([1.0, 2.0, 0.5, 4.0, 1.0])
    stored = np.random.default_rng(seed).normal(size=(rows, 1, 1, 1, 5)).astype("<f2")
    defaults = {"mean": mean.tolist(), "std": std.tolist(), "basis_sha256": "b" * 64, "latent_shape": [1, 1, 5]}
    write(
        root / "tiny" / "1x1x5.zarr",
        stored,
        kind="level",
        keys=[f"{seed}-{row}" for row in range(rows)],
        **(defaults | attributes),
    )
    return stored.astype(np.float64).reshape(rows, 5) * std + mean


def test_encoded_samples_are_scored_before_standardisation(
    recipe: Recipe, samples: Path, tmp_path: Path, store_writer: Writer
) -> None:
    real = features_root(store_writer, tmp_path / "stores" / "toy", 25, 1)
    drawn = features_root(store_writer, tmp_path / "encoded", 12, 2)
    score = scores(recipe, samples, samples_store=tmp_path / "encoded")["tiny 1x1x5"]
    assert score["frechet_distance"] == pytest.approx(frechet_distance(drawn, real), rel=1e-6)
    assert (score["samples"], score["reference"]["rows"], score["dimensions"]) == (12, 25, 5)


def test_what_samples_keep_of_their_rows_is_measured(
    trained: Trained, tmp_path: Path, store_writer: Writer, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(trained(rows=30, classes=3, sampling={"steps": 1}, evaluation={"protocol": "imagenet50k"}))
    frozen = FrozenSource(freeze_from=1, root=tmp_path / "stores" / "toy")
    sample(recipe, tmp_path / "s", Request(12, 0, 12, frozen=frozen))
    classes = np.arange(30) % 3
    apart = (10 * np.eye(3)[classes] + np.random.default_rng(0).normal(size=(30, 3)))[:, None, None, None, :]
    defaults = {"kind": "level", "mean": [0.0] * 3, "std": [1.0] * 3, "latent_shape": [1, 1, 3]}
    keys = [f"picture-{row}" for row in range(30)]
    store_writer(tmp_path / "stores" / "toy" / "tiny" / "1x1x3.zarr", apart.astype("<f2"), keys=keys, **defaults)
    own, others = apart[:12], apart[1:13]  # the features of the sources, and of rows of other classes
    found = []
    for name, values in (("own", own), ("others", others)):
        store_writer(tmp_path / name / "tiny" / "1x1x3.zarr", values.astype("<f2"), keys=keys[:12], **defaults)
        scores(recipe, tmp_path / "s", samples_store=tmp_path / name, encoder_level="1x1x3")
        card = read_json(tmp_path / "s" / "card.json")
        assert card["protocol"] is None  # which takes samples drawn from the top
        found.append(card["kept"])
    assert (found[0]["frozen_from"], found[0]["features"], found[1]["class"]) == (1, 1.0, 0.0)
    assert found[0]["class"] > 0.9
    assert found[1]["features"] < 0.5
    assert 0 <= found[0]["colours"] <= 1
    assert found[0]["chance"]["class"] == pytest.approx(1 / 3, abs=0.02)  # 12 rows of 3 classes
    assert "preserved of the rows, levels frozen from z_1: class" in capsys.readouterr().out
    hierarchy_sheet(recipe, tmp_path / "h.png", 2, 5, SheetOptions(), preserved=[tmp_path / "s" / "card.json"])
    rows = {tuple(row["frozen"]): row for row in read_json(tmp_path / "h.json")["rows"]}
    assert rows[1, 2]["kept"] == found[1]
    assert not any("kept" in rows[levels] for levels in ((), (2,)))  # their samples were not scored
    assert "colours preserved" in capsys.readouterr().out
    other = recipe.with_sampling({"steps": 3})
    with pytest.raises(UserError, match=r"card.json were made with other settings: z_0.steps was 1 and is 3; give"):
        hierarchy_sheet(other, tmp_path / "h.png", 2, 5, SheetOptions(), preserved=[tmp_path / "s" / "card.json"])


def test_of_the_only_row_samples_preserve_no_more_than_of_another(
    recipe: Recipe, tmp_path: Path, store_writer: Writer, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "one"
    copy_root(recipe, root, store_writer, lambda values: values[:1])
    sample(recipe, tmp_path / "s", Request(4, 0, 4, frozen=FrozenSource(1, root, 0)))
    for folder, rows, seed in ((root, 1, 1), (tmp_path / "stores" / "toy", 30, 2), (tmp_path / "encoded", 4, 3)):
        features_root(store_writer, folder, rows, seed)
    keys = ["other-0"]
    store_writer(root / "labels.zarr", np.array([-1]), kind="labels", keys=keys)
    scores(recipe, tmp_path / "s", samples_store=tmp_path / "encoded")
    kept = read_json(tmp_path / "s" / "card.json")["kept"]
    assert (kept["frozen_from"], kept["features"], kept["colours"], kept["class"]) == (1, None, None, None)
    assert "preserved" not in capsys.readouterr().out


def test_samples_like_none_stand_beside_no_row(recipe: Recipe, samples: Path, tmp_path: Path) -> None:
    scores(recipe, samples)
    with pytest.raises(UserError, match="does not say what its samples preserve; sample with --like each"):
        hierarchy_sheet(recipe, tmp_path / "h.png", 2, 0, SheetOptions(), preserved=[samples / "card.json"])
    assert not (tmp_path / "h.png").exists()


@pytest.mark.parametrize(
    ("rows", "attributes", "sentence"),
    [
        (12, {"basis_sha256": "c" * 64}, "differ in basis_sha256; extract one of them with --basis"),
        (12, {"std": [1.0] * 5}, "differ in std"),
        (13, {}, "has 13 rows for 12 samples"),
    ],
)
def test_unlike_encodings_are_refused(
    recipe: Recipe,
    samples: Path,
    tmp_path: Path,
    store_writer: Writer,
    rows: int,
    attributes: dict[str, Any],
    sentence: str,
) -> None:
    features_root(store_writer, tmp_path / "stores" / "toy", 25, 1)
    features_root(store_writer, tmp_path / "encoded", rows, 2, **attributes)
    with pytest.raises(UserError, match=sentence):
        scores(recipe, samples, samples_store=tmp_path / "encoded")
    assert not (samples / "card.json").exists()


def test_bad_input_is_one_sentence(recipe: Recipe, samples: Path, tmp_path: Path, store_writer: Writer) -> None:
    with pytest.raises(UserError, match=r"has no sample\.json; run `nestgen sample"):
        scores(recipe, tmp_path)
    with pytest.raises(UserError, match=r"was sampled from toy .*, but .* is other"):
        scores(recipe.model_copy(update={"name": "other"}), samples)
    with pytest.raises(UserError, match=r"there is no store .*2x2x4"):
        scores(recipe, samples, reference=tmp_path / "nowhere")
    with pytest.raises(UserError, match="8x8 is not a level; give --level-shape as height x width x channels"):
        scores(recipe, samples, samples_store=tmp_path, encoder_level="8x8")
    copy_root(recipe, tmp_path / "one", store_writer, lambda values: values[:1])
    with pytest.raises(UserError, match="reference cannot be scored in z_2: two sets of 2 or more"):
        scores(recipe, samples, reference=tmp_path / "one")
    copy_root(recipe, tmp_path / "nan", store_writer, lambda values: np.full_like(values, np.nan))
    with pytest.raises(UserError, match=r"cannot be scored in z_2: .*not finite"):
        scores(recipe, samples, reference=tmp_path / "nan")
    next(samples.glob("latents/z1.blocks/*.json")).unlink()
    with pytest.raises(UserError, match=r"z1\.zarr is unfinished"):
        scores(recipe, samples)


def test_a_store_extracted_again_is_not_what_was_trained_on(recipe: Recipe, samples: Path) -> None:
    card = read_json(samples / "sample.json")
    card["levels"][1]["store_fingerprint"] = "0" * 64
    write_json(samples / "sample.json", card)
    with pytest.raises(UserError, match=r"4x4x6\.zarr is not the store that z_1's denoiser was trained on"):
        scores(recipe, samples)


@settings(deadline=None)
@given(h=st.integers(1, 12), w=st.integers(1, 12), c=st.integers(1, 300))
def test_pooling_keeps_means_and_bounds_dimensions(h: int, w: int, c: int) -> None:
    z_NHWC = np.random.default_rng(0).normal(size=(2, h, w, c))
    vectors = pool(z_NHWC)
    if h * w * c <= DIMENSIONS:
        assert vectors.shape == (2, h * w * c)
    elif h == w and c <= DIMENSIONS:
        assert vectors.shape[1] <= DIMENSIONS
    means = vectors.reshape(2, c, -1).mean(-1)
    np.testing.assert_allclose(means, z_NHWC.mean((1, 2)), atol=1e-12)


def test_statistics_of_a_reference_are_computed_once(
    recipe: Recipe, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = scores(recipe, samples)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "statistics").iterdir()}
    assert len(kept) == 3
    with monkeypatch.context() as patch:
        patch.setattr(measure, "statistics_of", None)  # not called again
        assert scores(recipe, samples) == first
    cut = next(iter(kept))
    cut.write_bytes(cut.read_bytes()[:100])
    assert scores(recipe, samples) == first  # one that was cut off is computed again
    assert set((tmp_path / "statistics").iterdir()) == kept.keys()


def test_a_protocol_fixes_count_and_reference(recipe: Recipe, samples: Path, tmp_path: Path) -> None:
    def following(name: str) -> Recipe:
        options = EvaluationOptions.model_validate({"protocol": name})
        return recipe.model_copy(update={"evaluation": options})

    assert following("coco30k").evaluation.count == 30_000
    with pytest.raises(UserError, match="protocol imagenet50k: it takes 50000 samples, and there are 12"):
        scores(following("imagenet50k"), samples)
    write_json(samples / "sample.json", read_json(samples / "sample.json") | {"count": 30000})
    with pytest.raises(UserError, match=r"coco30k: its reference is the validation set: set evaluation.reference"):
        scores(following("coco30k"), samples)
    with pytest.raises(ValueError, match="has count 9, but protocol coco30k takes 30000 samples"):
        EvaluationOptions.model_validate({"protocol": "coco30k", "count": 9})
    assert (recipe.evaluation.inception, following("coco30k").evaluation.inception) == ("tensorflow", "pytorch-fid")
    with pytest.raises(ValueError, match="has inception tensorflow, but protocol coco30k takes pytorch-fid"):
        EvaluationOptions.model_validate({"protocol": "coco30k", "inception": "tensorflow"})


def test_a_recipe_s_pictures_that_are_not_there_leave_out_the_fid(
    recipe: Recipe, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nestgen.scoring.evaluate.find_weights", lambda inception: tmp_path / "weights.pth")
    options = EvaluationOptions.model_validate({"pictures": "../data/train"})
    recipe = recipe.model_copy(update={"evaluation": options})
    assert list(scores(recipe, samples)) == ["z_2", "z_1", "z_0"]
    assert "no FID: there are no pictures" in capsys.readouterr().out
    for explicit in ({"pictures": tmp_path / "none"}, {"inception": tmp_path / "weights.pth"}):
        with pytest.raises(UserError, match="there are no pictures"):
            scores(recipe, samples, **explicit)


def test_command_prints_a_line_a_score_and_never_says_fid(
    recipe: Recipe, samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe.root)
    run = CliRunner().invoke(main, ["evaluate", "--samples", "samples"])
    assert run.exit_code == 0, run.output
    assert len(run.output.splitlines()) == 3
    assert all("Fréchet distance" in line and "12 samples" in line for line in run.output.splitlines())
    card = (samples / "evaluation.json").read_text()
    assert "fid" not in (run.output + card).lower()
    run = CliRunner().invoke(main, ["evaluate", "--samples", "nowhere"])
    assert (run.exit_code, run.output.count("\n")) == (1, 1)
