"""The page of `nestgen explore`, in a real browser without a window, and its server's refusals."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from nestgen.errors import UserError
from nestgen.explore.encode import encode_image
from nestgen.explore.server import LONGEST, Server
from nestgen.explore.session import Session, png
from nestgen.pipeline import NestedPipeline
from nestgen.recipe.recipe import load_recipe
from nestgen.sampling.trained import with_settings
from tests.browser import browsing, needs_browser
from tests.nestgen.training_runs import SHRINK

Trained = Callable[..., Path]


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Path:
    """A run of three levels and two classes, with its stores."""
    sampling = {"steps": [3, 2, 2], "sigma": [None, 0.33, 0.5]}
    recipe = load_recipe(trained(sampling=sampling, classes=2, denoiser={"size": "nano", "labels": 2}))
    for folder in (tmp_path / "runs" / "toy").iterdir():
        shutil.copy(recipe.file, folder / "recipe.yaml")
    return tmp_path / "runs" / "toy"


@pytest.fixture
def session(run: Path) -> Session:
    return Session(NestedPipeline.from_run(run, device="cpu"))


def latents(session: Session, answer: dict[str, Any], level: int) -> torch.Tensor:
    """Latents (N, C, H, W) of the images of an answer."""
    return torch.stack([session.images[one["id"]].latents[level] for one in answer["images"]])


def test_levels_are_frozen_taken_from_two_and_walked_between(session: Session) -> None:
    first = session.answer("images", {"count": 2, "seed": 5})
    a, b = (one["id"] for one in first["images"])
    z_1, z_2 = latents(session, first, 1), latents(session, first, 2)
    held = session.answer("images", {"count": 3, "frozen": {"1": {"image": a}, "2": {"image": a}}})
    assert held["seed"] not in (5, session.pipe.recipe.seed)
    torch.testing.assert_close(latents(session, held, 1), z_1[:1].expand(3, -1, -1, -1))
    assert latents(session, held, 0).std(0).mean() > 0
    classes = [session.images[one["id"]].label for one in first["images"]]
    assert classes == list(session.pipe(num_images=2, seed=5).labels or ())
    assert {session.images[one["id"]].label for one in held["images"]} == {classes[0]}
    mixed = session.answer("images", {"count": 1, "frozen": {"1": {"image": a}, "2": {"image": b}}})
    torch.testing.assert_close(latents(session, mixed, 2), z_2[1:])
    walked = session.answer(
        "images", {"count": 3, "noise": a, "frozen": {str(level): {"from": a, "to": b} for level in (1, 2)}}
    )
    torch.testing.assert_close(latents(session, walked, 1)[[0, 2]], z_1, rtol=1e-4, atol=1e-5)
    assert {session.images[one["id"]].index for one in walked["images"]} == {0}
    settings = {"guidance_scale": [3, 1, 1], "sigma": [0.1, 0.2], "num_inference_steps": 3, "label": 1}
    changed = session.answer("images", {"count": 2, "seed": 5, "settings": settings})
    assert not torch.equal(latents(session, changed, 0), latents(session, first, 0))


def test_guidance_is_told_and_taken_after_its_decay(session: Session) -> None:
    recipe = session.pipe.recipe.with_sampling({"guidance": 1.0, "guidance_decay": 0.5})
    decayed = Session(replace(session.pipe, recipe=recipe, samplers=with_settings(session.pipe.samplers, recipe)))
    told = [one["guidance"] for one in decayed.describe()["levels"]]
    assert told == [1.25, 1.5, 2.0]
    by_recipe, by_page = (
        decayed.answer("images", {"seed": 5, "settings": settings}) for settings in ({}, {"guidance_scale": told})
    )
    for level in range(3):
        torch.testing.assert_close(latents(decayed, by_page, level), latents(decayed, by_recipe, level))


def test_new_samples_are_of_a_seed_that_was_not_typed(session: Session) -> None:
    typed = session.answer("images", {"seed": session.pipe.recipe.seed + 1})
    new = [session.answer("images", {})["seed"] for _ in range(2)]
    assert len({typed["seed"], *new}) == 3


def test_images_in_use_are_kept(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nestgen.explore.session.KEPT", 4)
    a, b, _ = (one["id"] for one in session.answer("images", {"count": 3})["images"])
    seen = {a, b}
    for _ in range(3):
        drawn = session.answer("images", {"count": 2, "frozen": {"2": {"image": a}}})["images"]
        assert not seen & {one["id"] for one in drawn}
        seen |= {one["id"] for one in drawn}
    with pytest.raises(ValueError, match="draw or bring images again"):
        session.answer("images", {"noise": b})


def test_nearest_rows_of_a_row_s_latents_begin_with_it(
    session: Session, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nestgen.explore.session import Shown
    from nestgen.sampling.real import real_latents

    rows = {level: real_latents(store, [7], 0)[0] for level, store in session.stores.items()}
    session.images[0] = Shown(rows, 0, 0, None)
    found = session.answer("nearest", {"image": 0, "count": 3})["levels"]
    assert sorted(found) == [0, 1, 2]
    for level in found:
        assert (found[level][0]["row"], found[level][0]["distance"]) == (7, 0.0)
        assert found[level][0]["png"].startswith("data:image/png;base64,")
    for large, searched in ((10_000, [1, 2]), (1, [])):  # z_0's store has 15,360 bytes
        with monkeypatch.context() as patch:
            patch.setattr("nestgen.explore.session.LARGE", large)
            assert sorted(session.answer("nearest", {"image": 0})["levels"]) == searched
            assert session.describe()["rows"] == bool(searched)
    shutil.rmtree(run.parents[1] / "stores")
    without = Session(session.pipe)
    assert not without.describe()["rows"]


def test_wrong_requests(session: Session) -> None:
    for name, request, sentence in (
        ("images", {"count": 65}, "give 64 at most"),
        ("images", {"count": 0}, "give 1 or more"),
        ("images", {"frozen": {"1": {"image": 9}}}, "image 9 is not known any more"),
        ("images", {"settings": {"label": 9}}, "there is no label 9"),
        ("images", {"settings": {"stps": 9}}, "no argument 'stps'"),
        ("nearest", {}, "image None is not known"),
        ("shutdown", {}, "no request 'shutdown'"),
    ):
        with pytest.raises((ValueError, TypeError), match=sentence):
            session.answer(name, request)


@pytest.fixture
def server() -> Iterator[Server]:
    """A server that answers with what it was asked."""
    failures = {
        "fails": UserError("it is so"),
        "fills": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/image.png"),
        "grows": RuntimeError("CUDA out of memory"),
    }

    def answer(name: str, request: dict[str, Any]) -> dict[str, Any]:
        if name in failures:
            raise failures[name]
        return {"name": name, **request}

    with Server(answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def call(server: Server, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(f"http://127.0.0.1:{server.server_port}{path}", body, named)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_only_who_has_the_token_and_the_address_gets_an_answer(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert len(server.token) > 16
    status, page = call(server, f"/?token={server.token}")
    assert (status, page.startswith("<!doctype html>")) == (200, True)
    assert "{{" not in page
    assert server.token not in page
    for path in ("/", "/?token=wrong", "/?token=%C3%A9"):
        assert call(server, path)[0] == 403
    assert call(server, f"/other?token={server.token}")[0] == 404
    token = server.token
    assert call(server, "/images", b'{"count": 1}', X_Token=token) == (200, '{"name": "images", "count": 1}')
    assert call(server, "/images", b"{}") == (403, '{"error": "open the whole address that nestgen explore printed"}')
    assert call(server, "/images", b"{}", X_Token="wrong")[0] == 403
    assert call(server, "/images", b"{}", X_Token=token, Host="evil.example")[0] == 403  # a name led to 127.0.0.1
    for name, reason in (("fails", "it is so"), ("fills", "No space left"), ("grows", "CUDA out of memory")):
        status, answer = call(server, f"/{name}", b"{}", X_Token=token)
        assert (status, reason in json.loads(answer)["error"]) == (400, True)
    assert json.loads(call(server, "/images", b" " * LONGEST, X_Token=token)[1])["error"].startswith("Expecting value")
    for wrong in (b"[]", b"{", b"\xff", b" " * LONGEST + b"{}"):
        status, answer = call(server, "/images", wrong, X_Token=token)
        assert status == 400
        assert json.loads(answer)["error"]
    with pytest.raises(UserError, match="cannot be used"):
        Server(lambda name, request: {}, server.server_port)


def test_a_phone_s_photo_goes_to_featurize_whose_reason_is_told(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    featurize = tmp_path / "featurize"
    featurize.write_text('#!/bin/sh\necho "error: $(ls "${2#folder:}") is cut off; $8 has a line for it" >&2\nexit 1\n')
    featurize.chmod(0o755)
    monkeypatch.setattr("nestgen.explore.encode.find_featurize", lambda: featurize)
    monkeypatch.setattr("nestgen.explore.encode.extraction_recipe", lambda recipe: {})
    photo, picture = io.BytesIO(), Image.new("RGB", (8, 8))
    picture.save(photo, "MPO", save_all=True, append_images=[picture])
    with pytest.raises(UserError, match=r"^featurize could not encode the image: image\.jpg is cut off$"):
        encode_image(session.pipe.recipe, photo.getvalue())


@needs_browser
def test_in_a_browser(run: Path, tmp_path: Path, begin: Callable) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    command = begin(tmp_path, "nestgen", "explore", run, before=SHRINK)
    try:
        while not (command.out.is_file() and command.out.read_text().count("\n") > 0):
            assert command.process.is_alive(), command.errors.read_text()
            time.sleep(0.05)
        address = command.out.read_text().splitlines()[0]
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]+", address), address
        with browsing(1200, 1500) as browser:
            first = NestedPipeline.from_run(run, device="cpu")(num_images=12, progress=False).images
            _play(browser, address, [png(image) for image in first], tmp_path, By, Keys, ActionChains, WebDriverWait)
            expected = ("favicon", "400 (Bad Request)")  # the last is the wrong seed's
            messages = [line["message"] for line in browser.get_log("browser")]
            assert [text for text in messages if not any(part in text for part in expected)] == []
        os.kill(command.process.pid, signal.SIGINT)
        code, _, errors = command.ended()
        assert (code, errors.strip().splitlines()[-1:]) == (130, ["interrupted"])
    finally:
        command.process.kill()


def _play(
    browser: Any, address: str, first: list[str], tmp_path: Path, By: Any, Keys: Any, ActionChains: Any, Wait: Any
) -> None:
    """Does what a visitor does: looks, clicks, freezes, mixes, walks, moves a slider."""

    def all_of(selector: str) -> list[Any]:
        return browser.find_elements(By.CSS_SELECTOR, selector)

    def wait_for(selector: str, count: int) -> list[Any]:
        Wait(browser, 60).until(lambda _: len(all_of(selector)) == count and idle())
        return all_of(selector)

    def idle() -> bool:
        return browser.execute_script("return document.body.dataset.busy") == "0"

    browser.get(address)
    samples = wait_for("#samples button.image", 12)
    assert [one.get_attribute("src") for one in all_of("#samples img")] == first  # by the recipe's settings
    assert browser.title == "toy"
    assert "z_2 2x2x4 → z_1 4x4x6 → z_0 8x8x3 → image" in browser.page_source
    assert all(one.get_attribute("naturalWidth") == "8" for one in all_of("#samples img"))
    assert not browser.find_element(By.ID, "mix").is_enabled()
    samples[0].click()
    wait_for("#holds .row[data-level='2'] img", 6)
    wait_for("#holds .row[data-level='1'] img", 6)
    assert len({one.get_attribute("src") for one in all_of("#holds .row[data-level='2'] img")}) == 6
    assert len(wait_for("#nearest .row", 3)[0].find_elements(By.TAG_NAME, "img")) == 6
    ActionChains(browser).key_down(Keys.SHIFT).click(samples[1]).key_up(Keys.SHIFT).perform()
    assert "b" in samples[1].get_attribute("class").split()
    browser.find_element(By.ID, "second").click()
    samples[2].click()
    assert "b" in samples[2].get_attribute("class").split()
    assert "b" not in samples[1].get_attribute("class").split()
    all_of("#choices input[name='choice-2'][value='a']")[0].click()
    all_of("#choices input[name='choice-1'][value='b']")[0].click()
    browser.find_element(By.ID, "mix").click()
    wait_for("#mixed img", 6)
    browser.find_element(By.ID, "walk").click()
    wait_for("#walked img", 7)
    before = [one.get_attribute("src") for one in all_of("#walked img")]
    assert len(set(before)) > 1
    slider = all_of("#settings input[name='guidance'][data-level='0']")[0]
    slider.send_keys(Keys.END)
    Wait(browser, 60).until(lambda _: idle() and len(all_of("#holds img")) == 12)
    assert slider.get_attribute("value") == "5"
    browser.find_element(By.ID, "walk").click()
    Wait(browser, 60).until(lambda _: idle() and [one.get_attribute("src") for one in all_of("#walked img")] != before)
    assert all(image.get_attribute("alt") for image in all_of("img"))
    browser.save_screenshot(str(tmp_path / "page.png"))
    seed = browser.find_element(By.ID, "seed")
    seed.send_keys("-3")
    browser.find_element(By.ID, "draw").click()
    Wait(browser, 60).until(lambda _: "seed is -3; give 0 or more" in browser.find_element(By.ID, "status").text)


def test_levels_are_those_of_the_recipe(session: Session) -> None:
    told = session.describe()
    assert [one["shape"] for one in told["levels"]] == ["8x8x3", "4x4x6", "2x2x4"]
    assert [one["sigma"] for one in told["levels"]] == [0.0, 0.33, 0.5]
    assert told["classes"] == ["class 0", "class 1"]
