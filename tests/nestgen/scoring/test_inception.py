"""The FID: torch-fidelity's network on weights in the official layout, and nothing that a pickle could run."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from nestgen.cli.main import main
from nestgen.errors import UserError
from nestgen.files import read_json, sha256_of
from nestgen.recipe.recipe import load_recipe
from nestgen.sampling.conditions import Request
from nestgen.sampling.sample import sample
from nestgen.scoring import inception
from nestgen.scoring.frechet import fit_gaussian, frechet_distance, gaussian_distance
from nestgen.scoring.inception import folder_features, load_inception, published_moments

Trained = Callable[..., Path]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of torch-fidelity's Inception, saved as its release is."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path_factory.mktemp("inception") / inception.WEIGHTS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **options: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(network.state_dict(), path)
    return path


def write_pictures(folder: Path, count: int, side: tuple[int, int], seed: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for number in range(count):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(side).save(folder / f"{number}.png")


def test_features_are_torch_fidelitys(weights: Path, tmp_path: Path) -> None:
    from torch_fidelity.utils import create_feature_extractor

    write_pictures(tmp_path / "a", 5, (24, 24), 0)
    network = create_feature_extractor(
        "inception-v3-compat", ["2048"], cuda=False, feature_extractor_weights_path=str(weights), verbose=False
    )
    pictures = np.stack([np.asarray(Image.open(tmp_path / "a" / f"{number}.png")) for number in range(5)])
    expected = network(torch.from_numpy(pictures).permute(0, 3, 1, 2))[0].numpy()
    found = folder_features(tmp_path / "a", load_inception(weights))
    assert found.shape == (5, 2048)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_pictures_of_another_shape_are_cropped_and_resized(weights: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    wide = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    (tmp_path / "wide").mkdir()
    Image.fromarray(wide).save(tmp_path / "wide" / "0.png")
    seen: list[np.ndarray] = []
    folder_features(tmp_path / "wide", lambda pictures: seen.append(pictures) or np.zeros((1, 1)), side=10)
    expected = Image.fromarray(wide[:, 5:25]).resize((10, 10), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(seen[0][0], np.asarray(expected))


def fidelity_command(first: Path, second: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> float:
    """What torch-fidelity's own command says of two folders, all of it but for one line of linear algebra.

    It takes the eigenvalues of a 2048 x 2048 product of covariances, which is half a minute. Of the few pictures here the
    product M has a rank below 8: with V an orthonormal basis of its columns, the eigenvalues that are not 0 are V^T M V's.
    """
    from torch_fidelity import fidelity

    eigvals = np.linalg.eigvals

    def of_low_rank(product: np.ndarray) -> np.ndarray:
        columns = np.linalg.qr(product @ np.random.default_rng(0).normal(size=(len(product), 8)))[0]
        return eigvals(columns.T @ product @ columns)

    printed = io.StringIO()
    options = ["--fid", "--cpu", "--json", "--silent", "--no-cache", "--save-cpu-ram"]
    options += ["--input1", str(first), "--input2", str(second), "--feature-extractor-weights-path", str(weights)]
    with monkeypatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(np.linalg, "eigvals", of_low_rank)
        patch.setattr("sys.argv", ["fidelity", *options])
        fidelity.main()
    return float(json.loads(printed.getvalue())["frechet_inception_distance"])


def test_evaluate_adds_torch_fidelitys_fid_where_weights_and_pictures_are(
    weights: Path, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(trained(sampling={"steps": 1}))
    sample(recipe, tmp_path / "s", Request(3, 0, 3))
    write_pictures(tmp_path / "real", 4, (8, 8), 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "no-cache"))

    def run(*options: str) -> tuple[dict[str, Any], str]:
        result = CliRunner().invoke(main, ["evaluate", "--samples", "s", *options])
        assert result.exit_code == 0, result.output
        return read_json(Path("s/evaluation.json"))["scores"][-1], result.output

    score, printed = run("--pictures", "real", "--inception", str(weights))
    expected = fidelity_command(tmp_path / "s", tmp_path / "real", weights, monkeypatch)
    assert (score["space"], score["name"]) == ("Inception", "FID")
    assert score["frechet_distance"] == pytest.approx(expected, rel=1e-5)
    assert score["weights_sha256"] == sha256_of(weights)
    assert score["reference"]["rows"] == 4
    assert "\nInception    FID " in printed
    assert run()[0]["space"] == "z_0"  # neither is there
    for options, sentence in (
        (("--inception", str(weights)), "an FID needs real pictures"),
        (("--pictures", "real"), "an FID needs Inception's weights"),
        (("--pictures", "real", "--inception", "nowhere.pth"), "there are no Inception weights nowhere.pth"),
        (("--pictures", "nowhere", "--inception", str(weights)), "there are no pictures nowhere"),
        (("--pictures", "s/sample.json", "--inception", str(weights)), "is not an .npz with arrays mu and sigma"),
    ):
        result = CliRunner().invoke(main, ["evaluate", "--samples", "s", *options])
        assert (result.exit_code, sentence in result.output) == (1, True), result.output


class Harmful:
    """What a pickle may hold."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_published_moments_are_read(tmp_path: Path) -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 40, 6))
    np.savez(tmp_path / "moments.npz", mu=y.mean(0), sigma=np.cov(y, rowvar=False))
    found = gaussian_distance(fit_gaussian(x), published_moments(tmp_path / "moments.npz"))
    assert found == pytest.approx(frechet_distance(x, y))


def test_a_pickle_runs_no_code(weights: Path, tmp_path: Path) -> None:
    harmful = tmp_path / "weights.pth"
    torch.save({"a": Harmful(tmp_path / "ran")}, harmful)
    with pytest.raises(UserError, match="does not hold Inception's weights"):
        load_inception(harmful)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Harmful(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()  # it would have
    torch.save({"conv": torch.zeros(3)}, harmful)
    with pytest.raises(UserError, match="does not hold Inception's weights"):
        load_inception(harmful)
