"""The report: what it says follows its numbers, and what it looks like in a browser."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.browser import browsing, needs_browser
from tests.pipelines.conftest import PIPELINES  # which lets `workflow` be imported


def scores(**distances: tuple[float | None, ...]) -> list:
    from workflow.sentences import SpaceScores

    return [SpaceScores(space, 8, values, None) for space, values in distances.items()]


@pytest.mark.parametrize(
    ("distances", "heading", "ends"),
    [
        ({"a": (3.0, 2.0, 1.0)}, "Samples get better with depth", ["lower with every level"]),
        (
            {"a": (3.0, 2.0, 2.5), "b": (3.0, 2.0, 1.0)},
            "Depth helps in part",
            ["L = 2 is best", "lower with every level"],
        ),
        ({"a": (1.0, 2.0, 2.5)}, "Samples do not get better with depth", ["L = 1 is best"]),
        ({"a": (None, 2.0, 2.5)}, "Samples", []),
    ],
)
def test_sentences_on_depth_follow_the_numbers(
    distances: dict[str, tuple[float | None, ...]], heading: str, ends: list[str]
) -> None:
    from workflow.sentences import depth_heading, depth_sentences

    assert depth_heading(scores(**distances), (1, 2, 3)) == heading
    assert [one.rpartition(": ")[2] for one in depth_sentences(scores(**distances), (1, 2, 3))] == [
        f"{end}." for end in ends
    ]


def test_sentences_on_levels_and_neighbours_follow_the_numbers() -> None:
    from workflow.sentences import levels_sentence, neighbours_sentence

    rows = [
        {"frozen": [], "variation": 50.0},
        {"frozen": [2], "variation": 40.0},
        {"frozen": [1, 2], "variation": 20.0},
    ]
    assert levels_sentence(rows) == (
        "The more levels are frozen, the less the samples vary: by 50 with nothing frozen, 40 with z_2 frozen, "
        "20 with z_1 and z_2 frozen (of 255)."
    )
    rows[2]["variation"] = 45.0
    assert levels_sentence(rows).startswith("So much the samples vary: by 50")
    assert neighbours_sentence({"1x1x64": 0.9, "raw pixels": 0.4}, 0.1) == (
        "By 1x1x64, 90% of an image's neighbours have its label; by raw pixels 40%, by chance 10%."
    )
    assert neighbours_sentence({"1x1x64": 0.3, "raw pixels": 0.4}, 0.1).startswith("By raw pixels, 40% of an image's")
    assert neighbours_sentence({"1x1x64": None}, None) == ""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of an experiment that is made up: images of noise, and numbers of which only some fall."""
    from click.testing import CliRunner

    from workflow.report import main

    folder = tmp_path_factory.mktemp("report")
    random = np.random.default_rng(0)

    def image(path: str, height: int = 16, width: int = 16) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / path)

    for index in range(10):
        for where in ("samples/L1", "samples/L2", "real/images", "real/decoded"):
            image(f"{where}/{index:06d}.png")
    for name in ("samples/L1-sheet", "samples/L2-sheet", "hierarchy", "knn", "knn-overlap"):
        image(f"{name}.png", 300, 900)
    levels = [{"sampler": "heun", "steps": 4, "condition_sigma": 0.5}]
    for depth, distance in ((1, 8.0), (2, 9.0)):
        card = {
            "samples": {"depth": depth, "count": 10, "seed": 0, "levels": levels * depth},
            "scores": [
                {"space": "z_0", "dimensions": 8, "frechet_distance": distance, "floor": {"frechet_distance": 1.0}},
                {"space": "tiny 1x1x64", "dimensions": 64, "frechet_distance": 10 - distance},
            ],
        }
        (folder / f"samples/L{depth}/evaluation.json").write_text(json.dumps(card))
    kept = {"class": 0.5, "features": None, "colours": 0.9}
    rows = [
        {"frozen": [], "variation": 50.0},
        {"frozen": [1], "variation": 20.0, "kept": kept | {"chance": kept, "samples": 9}},
    ]
    (folder / "hierarchy.json").write_text(json.dumps({"rows": rows}))
    knn = {"label_agreement": {"1x1x64": 0.9}, "chance": 0.1, "neighbours": 10}
    (folder / "knn.json").write_text(json.dumps(knn))
    # The encoder and the steps are left to their defaults.
    recipe = {"name": "made-up", "features": {"out": "s", "z0": "vae:32"}}
    (folder / "nested.yaml").write_text(json.dumps(recipe | {"levels": [{"shape": "8x8x8"}, {"shape": "1x1x64"}]}))
    (folder / "runs/z0-top").mkdir(parents=True)
    (folder / "runs/z0-top/log.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = CliRunner().invoke(main, ["L1", "L2", "--runs", "runs", "--out", "report.html"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return folder / "report.html"


def test_it_stands_alone_and_says_what_is_so(page: Path) -> None:
    text = page.read_text()
    assert "<h2>Depth helps in part</h2>" in text
    assert "In z_0 the distance is 8 at L = 1, 9 at L = 2: L = 1 is best." in text
    assert "<b>tiny</b>" in text and "trained for 300000 steps" in text and "z_1 1x1x64 → z_0 8x8x8 → image" in text
    assert not re.findall(r'(?:src|href)="(?!data:image|#)[^"]*', text)
    assert "in green where its label is the query's" in text


@needs_browser
def test_in_a_browser_wide_and_narrow_light_and_dark(page: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    address = page.as_uri()
    with browsing(1100) as browser:
        browser.get(address)
        images = browser.find_elements(By.TAG_NAME, "img")
        assert all(one.get_attribute("alt") and int(one.get_attribute("naturalWidth")) > 0 for one in images)
        assert len(browser.find_elements(By.CSS_SELECTOR, "table.images td img")) == 40
        light = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        browser.find_element(By.CSS_SELECTOR, "img[alt='L = 2, image 3']").click()
        dialog = browser.find_element(By.ID, "zoom")
        assert "L = 2, image 3" in dialog.text and "samples/L2/000003.png" in dialog.text
        large, sheet = dialog.find_elements(By.TAG_NAME, "img")
        assert (large.get_attribute("naturalWidth"), sheet.get_attribute("naturalWidth")) == ("16", "900")
        assert large.size["width"] > 200 and sheet.is_displayed()
        dialog.send_keys(Keys.ESCAPE)
        assert not dialog.is_displayed()
        browser.find_element(By.CSS_SELECTOR, "img[alt='Nearest neighbours at each level']").click()
        assert "knn.png" in dialog.text and len(dialog.find_elements(By.TAG_NAME, "img")) == 1
        assert browser.get_log("browser") == []
        shown = Image.open(io.BytesIO(browser.get_screenshot_as_png()))
        assert np.asarray(shown).std() > 10
    with browsing(390, 800, dark=True) as browser:
        browser.get(address)
        assert browser.execute_script("return document.documentElement.scrollWidth") == 390
        scrolls = browser.execute_script(
            "return [...document.querySelectorAll('.scroll')].some(one => one.scrollWidth > one.clientWidth)"
        )
        assert scrolls, "the table of images is wider than a phone"
        dark = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (light, dark) == ("rgb(255, 255, 255)", "rgb(24, 24, 24)")


def test_the_command_is_where_the_workflow_looks(pipelines: Path) -> None:
    from workflow.steps import shell_functions

    assert str(pipelines / "report.py") in shell_functions(Path("bin"), 0, None)
    assert (PIPELINES / "report.py").is_file()
