"""The FID: torch-fidelity's network on weights in the official layout, and nothing that a pickle could run."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
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
from nestgen.scoring.compare import compare
from nestgen.scoring.evaluate import References, evaluate
from nestgen.scoring.frechet import fit_gaussian, frechet_distance, gaussian_distance
from nestgen.scoring.inception import find_weights, folder_features, load_inception, published_moments

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
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):  # torch's own initial weights make features of 1e-6 for every image
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
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
    found = folder_features(tmp_path / "a", load_inception(weights, "tensorflow"))
    assert found.shape == (5, 2048)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def by_torchvision(folder: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """pytorch-fid's features of the images of a folder, in float64, by torchvision's network with its two repairs.

    Average pools don't count the padding, and that of the last block is a maximum.
    """
    from torchvision.models.inception import Inception3
    from torchvision.transforms.functional import to_tensor

    average = torch.nn.functional.avg_pool2d

    def pool(x: torch.Tensor, kernel_size: int, stride: int, padding: int) -> torch.Tensor:
        if x.shape[1] == 2048:
            return torch.nn.functional.max_pool2d(x, kernel_size, stride, padding)
        return average(x, kernel_size, stride, padding, count_include_pad=False)

    network = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    network.load_state_dict(torch.load(weights, weights_only=True))
    network.fc = torch.nn.Identity()
    images = torch.stack([to_tensor(Image.open(path)) for path in sorted(folder.iterdir())]).double()
    # bilinear with half-pixel centres, by hand: pixel i of 299 lies at (i + 1/2) n / 299 - 1/2, within the image
    for dim in (2, 3):
        n = images.shape[dim]
        at = ((torch.arange(299, dtype=torch.float64) + 0.5) * n / 299 - 0.5).clamp(0, n - 1)
        low = at.floor().long()
        share = (at - low).view(-1, 1) if dim == 2 else at - low
        pair = images.index_select(dim, low), images.index_select(dim, (low + 1).clamp(max=n - 1))
        images = pair[0] * (1 - share) + pair[1] * share
    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(torch.nn.functional, "avg_pool2d", pool)
        return network.double().eval()(images * 2 - 1).numpy()


@pytest.mark.parametrize("side", [(24, 24), (320, 310)])
def test_features_as_in_pytorch_fid_are_those_of_its_network(
    side: tuple[int, int], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path / "a", 3, side, 0)
    found = folder_features(tmp_path / "a", load_inception(weights, "pytorch-fid"))
    np.testing.assert_allclose(found, by_torchvision(tmp_path / "a", weights, monkeypatch), rtol=1e-4, atol=1e-6)
    other = folder_features(tmp_path / "a", load_inception(weights, "tensorflow"))
    assert np.linalg.norm(found - other) > 3e-3 * np.linalg.norm(found)
    assert np.linalg.norm(found[0] - found[1]) > 0.1 * np.linalg.norm(found[0])  # and the weights see the image


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
    monkeypatch.setattr(inception, "ADDRESS", "http://127.0.0.1:9/weights.pth")  # nothing listens there

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
    assert printed.rstrip().endswith("2048 dimensions, Inception as in tensorflow")
    assert score["inception"] == "tensorflow"
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


def test_the_card_says_which_way_into_inception_and_the_two_are_not_compared(
    weights: Path, trained: Trained, tmp_path: Path
) -> None:
    cards = []
    write_pictures(tmp_path / "real", 4, (8, 8), 2)
    file = trained(sampling={"steps": 1})
    sample(load_recipe(file), tmp_path / "s", Request(3, 0, 3))
    for kind in ("tensorflow", "pytorch-fid"):
        recipe = load_recipe(file)
        options = recipe.evaluation.model_copy(update={"inception": kind})
        cards.append(tmp_path / f"{kind}.json")
        references = References(pictures=tmp_path / "real", inception=weights)
        evaluate(recipe.model_copy(update={"evaluation": options}), tmp_path / "s", references, cards[-1])
    first, second = (read_json(card)["scores"][-1] for card in cards)
    assert (first["inception"], second["inception"]) == ("tensorflow", "pytorch-fid")
    features = [folder_features(tmp_path / one, load_inception(weights, "pytorch-fid")) for one in ("s", "real")]
    assert second["frechet_distance"] == pytest.approx(frechet_distance(*features), rel=1e-6)
    assert first["frechet_distance"] != pytest.approx(second["frechet_distance"], rel=1e-5)  # nor is its cache shared
    with pytest.raises(UserError, match="inception in Inception is tensorflow and pytorch-fid"):
        compare(cards)


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
        load_inception(harmful, "tensorflow")
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Harmful(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()  # it would have
    torch.save({"conv": torch.zeros(3)}, harmful)
    with pytest.raises(UserError, match="does not hold Inception's weights"):
        load_inception(harmful, "tensorflow")


def test_published_weights_are_fetched_once_and_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "weights.pth").write_bytes(b"weights" * 1000)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "checkpoints" / inception.WEIGHTS
    with served(tmp_path / "served") as address:
        monkeypatch.setattr(inception, "ADDRESS", f"{address}/weights.pth")
        with pytest.raises(UserError, match=r"gave a file with the SHA-256 .*; it is not kept"):
            find_weights(None)
        assert list((tmp_path / "hub" / "checkpoints").iterdir()) == []
        monkeypatch.setattr(inception, "SHA256", sha256_of(tmp_path / "served" / "weights.pth"))
        assert find_weights(None) == cached
    assert find_weights(None) == cached  # without the server
    cached.write_bytes(b"other")
    with pytest.raises(UserError, match="is not the published file"):
        find_weights(None)
    cached.unlink()
    with pytest.raises(
        UserError, match=r"cannot be fetched \(.*refused.*\); copy http.* to .*, or name the file with --inception"
    ):
        find_weights(None)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Address of a server of a folder's files."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder))) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
