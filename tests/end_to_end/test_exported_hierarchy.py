"""An exported hierarchy meets further images: rows that featurize makes for it, and one that somebody brings to its page."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nestgen import NestedPipeline
from nestgen.explore.server import Server
from nestgen.explore.session import Session
from nestgen.images import read_images
from nestgen.recipe.recipe import load_recipe
from nestgen.sampling.real import open_real, real_latents
from tests.browser import browsing, needs_browser
from tests.end_to_end.test_pictures_to_samples import Run, checked
from tests.pipelines.served import serving

RECIPE = {
    "name": "small",
    "features": {"source": "scenes:16", "out": "stores/train", "encoder": "tiny", "z0": "pixels:16", "limit": 48},
    "levels": [{"shape": "16x16x3", "patch": 4}, {"shape": "2x2x8", "sigma": 0.5}, {"shape": "1x1x8", "sigma": 0.5}],
    "denoiser": {"size": "nano"},
    "training": {"steps": 2, "batch": 8, "warmup": 1, "checkpoint_every": 2, "preview": 0},
    "sampling": {"steps": 2},
}


@pytest.fixture(scope="module")
def run(begin: Callable) -> Run:
    return lambda folder, *words: checked(*begin(folder, *words).ended())


@pytest.fixture(scope="module")
def experiment(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, its stores, and held-out rows; exported beside it to `elsewhere/model`."""
    folder = tmp_path_factory.mktemp("secret") / "experiment"
    folder.mkdir()
    (folder / "nested.yaml").write_text(json.dumps(RECIPE))
    run(folder, "featurize", "extract", "--workers", 0)
    held_out = ("scenes:16", "--split", "val", "--limit", 5, "--basis", "stores/train", "--workers", 0)
    run(folder, "featurize", "extract", *held_out, "--out", "stores/val")
    for level in range(3):
        run(folder, "nestgen", "train", "--level", level)
    run(folder, "nestgen", "export", "runs/small", "--out", folder.parent / "elsewhere" / "model")
    return folder


def test_further_rows_are_the_same_as_by_the_store_it_was_trained_on(experiment: Path, run: Run) -> None:
    elsewhere = experiment.parent / "elsewhere"
    for file in (elsewhere / "model").rglob("*"):
        assert file.is_dir() or str(experiment.parent).encode() not in file.read_bytes(), file
    words = ("scenes:16", "--split", "val", "--limit", 5, "--recipe", "model/features/nested.yaml", "--workers", 0)
    run(elsewhere, "featurize", "extract", *words, "--out", "val")
    for name in ("tiny/2x2x8", "tiny/1x1x8", "pixels/16x16x3"):
        seals = [
            json.loads((root / f"{name}.seal.json").read_text())
            for root in (experiment / "stores/val", elsewhere / "val")
        ]
        assert seals[0]["sha256"] == seals[1]["sha256"], name
    like = ("sample", "--count", 3, "--like", "each", "--freeze-from", 1, "--out", "like", "--store")
    run(experiment, "nestgen", *like, "stores/val")
    run(elsewhere, "nestgen", *like, "val", "--pretrained", "model")
    np.testing.assert_array_equal(read_images(experiment / "like", 3), read_images(elsewhere / "like", 3))
    for option in (("--like", 2), ("--interpolate", 1, 3)):
        sheet = ("hierarchy", *option, "--columns", 3, "--out", "sheet.png", "--store")
        run(experiment, "nestgen", *sheet, "stores/val")
        run(elsewhere, "nestgen", *sheet, "val", "--pretrained", "model")
        assert (experiment / "sheet.png").read_bytes() == (elsewhere / "sheet.png").read_bytes()


def test_exported_again_it_keeps_what_encodes_further_images(experiment: Path, tmp_path: Path) -> None:
    model = experiment.parent / "elsewhere" / "model"
    NestedPipeline.from_pretrained(model, device="cpu").save_pretrained(tmp_path / "again")
    files = sorted(file.relative_to(model) for file in (model / "features").rglob("*") if file.is_file())
    assert len(files) == 10  # of four arrays metadata and seal, the basis, the recipe
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (model / file).read_bytes(), file


def test_a_vae_of_one_s_own_encodes_further_images(run: Run, tmp_path: Path) -> None:
    """The export has it, with its description beside it: a folder that is not there any more."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    shutil.copytree(files("featurize") / "weights" / "tiny_vae", here / "my-vae")
    features = RECIPE["features"] | {"z0": "vae:16", "z0_weights": "my-vae", "limit": 8}
    levels = [{"shape": "4x4x8"}, {"shape": "2x2x8", "sigma": 0.5}]
    (here / "nested.yaml").write_text(json.dumps(RECIPE | {"features": features, "levels": levels}))
    run(here, "featurize", "extract", "--workers", 0)
    for level in range(2):
        run(here, "nestgen", "train", "--level", level)
    run(here, "nestgen", "export", "runs/small", "--out", elsewhere / "model")
    shutil.rmtree(here)
    words = ("--limit", 2, "--recipe", "model/features/nested.yaml", "--out", "mine", "--workers", 0)
    run(elsewhere, "featurize", "extract", "scenes:16", *words)
    run(
        elsewhere,
        "nestgen",
        "sample",
        "--pretrained",
        "model",
        "--like",
        1,
        "--store",
        "mine",
        "--count",
        2,
        "--out",
        "s",
    )


@pytest.fixture(scope="module")
def featurize(begin: Callable, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The command featurize without the seconds of a start."""
    with serving(lambda *words: begin(*words).ended(), tmp_path_factory.mktemp("served")) as folder:
        yield folder / "featurize"


@pytest.fixture
def found(featurize: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page finds that command."""
    monkeypatch.setattr("nestgen.explore.encode.find_featurize", lambda: featurize)


@pytest.mark.parametrize("exported", [True, False], ids=["exported", "run"])
def test_an_image_that_is_brought_has_the_latents_of_its_row(
    experiment: Path, exported: bool, run: Run, found: None
) -> None:
    model = experiment.parent / "elsewhere" / "model"
    pipe = (
        NestedPipeline.from_pretrained(model, device="cpu")
        if exported
        else NestedPipeline.from_run(experiment / "runs" / "small", device="cpu")
    )
    session = Session(pipe)
    described = session.answer("describe", {})
    assert (described["cannot_encode"], described["rows"]) == ("", not exported)
    run(experiment, "featurize", "images", "stores/val", "--count", 2, "--size", 16, "--out", "real")
    data = base64.b64encode((experiment / "real" / "000001.png").read_bytes()).decode()
    brought = session.answer("encode", {"data": data})["images"][0]
    recipe = load_recipe(experiment / "nested.yaml")
    for level in range(3):
        row = real_latents(open_real(recipe, level, experiment / "stores" / "val"), [1], 0)[0]
        torch.testing.assert_close(session.images[brought["id"]].latents[level], row, rtol=0, atol=2e-2)
    frozen = {str(level): {"image": brought["id"]} for level in (1, 2)}
    drawn = session.answer("images", {"count": 2, "frozen": frozen})["images"]
    assert len({one["png"] for one in drawn}) == 2
    assert (0 in session.answer("nearest", {"image": brought["id"]})["levels"]) != exported
    with pytest.raises(Exception, match="this is no image that can be read"):
        session.answer("encode", {"data": base64.b64encode(b"text").decode()})


def test_without_stores_or_featurize_it_says_so(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(experiment.parent / "elsewhere" / "model", tmp_path / "model")
    pipe = NestedPipeline.from_pretrained(model, device="cpu")
    monkeypatch.setattr("nestgen.explore.encode.find_featurize", lambda: None)
    assert Session(pipe).describe()["cannot_encode"] == "Images are encoded by featurize, which is not installed."
    shutil.rmtree(model / "features")
    assert Session(pipe).describe()["cannot_encode"].startswith("Its stores are not at hand")
    with pytest.raises(Exception, match="Its stores are not at hand"):
        Session(pipe).answer("encode", {"data": ""})


@needs_browser
def test_an_image_is_brought_in_a_browser(experiment: Path, found: None, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "mine.jpg")
    (tmp_path / "text.jpg").write_text("no image")
    pipe = NestedPipeline.from_pretrained(experiment.parent / "elsewhere" / "model", device="cpu")
    with Server(Session(pipe).answer) as server, browsing() as browser:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def wait_for(selector: str, count: int) -> None:
            WebDriverWait(browser, 60).until(
                lambda _: (
                    len(browser.find_elements(By.CSS_SELECTOR, selector)) == count
                    and browser.execute_script("return document.body.dataset.busy") == "0"
                )
            )

        browser.get(server.address)
        wait_for("#samples img", 12)
        file = browser.find_element(By.ID, "file")
        file.send_keys(str(tmp_path / "mine.jpg"))
        wait_for("#holds img", 12)
        brought = browser.find_element(By.CSS_SELECTOR, "#brought button")
        assert brought.get_attribute("class") == "image a"
        assert brought.find_element(By.TAG_NAME, "img").get_attribute("naturalWidth") == "16"
        assert "mine.jpg" in browser.find_element(By.ID, "brought").text
        assert not browser.find_element(By.ID, "cannot-bring").is_displayed()
        file.send_keys(str(tmp_path / "text.jpg"))
        WebDriverWait(browser, 60).until(lambda _: "no image that" in browser.find_element(By.ID, "status").text)
        server.shutdown()
