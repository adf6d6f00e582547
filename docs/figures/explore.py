"""Takes the picture of docs/explore.md: the page of `nestgen explore`, after some clicks, in Debian's chromium.

python docs/figures/explore.py [NAME]     # NAME: an exported folder or a hierarchy that ships with nestgen
"""

from __future__ import annotations

import base64
import shutil
import threading
from pathlib import Path
from typing import Any

import click

from nestgen import NestedPipeline
from nestgen.explore.server import Server
from nestgen.explore.session import Session

OUT = Path(__file__).parents[1] / "explore.png"
WIDTH = 1180


@click.command()
@click.argument("name", default="scenes")
@click.option("--a", default=1, show_default=True, help="Number of the sample that becomes A.")
@click.option("--b", default=5, show_default=True, help="Number of the sample that becomes B.")
def main(name: str, a: int, b: int) -> None:
    """Opens the page of NAME, clicks A and B, mixes their levels, walks between them, and takes the picture."""
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars", f"--window-size={WIDTH},1000"):
        options.add_argument(argument)
    pipe = NestedPipeline.from_pretrained(name, device="cpu")
    with Server(Session(pipe).answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(shutil.which("chromedriver"))))

        def all_of(selector: str) -> list[Any]:
            return browser.find_elements(By.CSS_SELECTOR, selector)

        def wait_for(selector: str, count: int) -> list[Any]:
            WebDriverWait(browser, 600).until(
                lambda _: (
                    len(all_of(selector)) == count
                    and browser.execute_script("return document.body.dataset.busy") == "0"
                )
            )
            return all_of(selector)

        try:
            browser.get(server.address)
            samples = wait_for("#samples button.image", 12)
            samples[a].click()
            wait_for("#holds img", 6 * (len(pipe.samplers) - 1))
            browser.find_element(By.ID, "second").click()
            samples[b].click()
            all_of("#choices input[value='a']")[0].click()
            all_of("#choices input[value='b']")[-1].click()
            browser.find_element(By.ID, "mix").click()
            wait_for("#mixed img", 6)
            browser.find_element(By.ID, "walk").click()
            wait_for("#walked img", 7)
            browser.execute_script("window.scrollTo(0, 0)")
            height = browser.execute_script("return document.documentElement.scrollHeight")
            clip = {"x": 0, "y": 0, "width": WIDTH, "height": height, "scale": 1}
            taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
            OUT.write_bytes(base64.b64decode(taken["data"]))
        finally:
            browser.quit()
            server.shutdown()
    click.echo(OUT)


if __name__ == "__main__":
    main()
