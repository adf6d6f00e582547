"""Debian's chromium without a window, for tests of pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

DRIVER, CHROMIUM = (shutil.which(name) for name in ("chromedriver", "chromium"))

needs_browser = pytest.mark.skipif(
    DRIVER is None or CHROMIUM is None, reason="needs Debian's chromium and chromium-driver"
)


@contextmanager
def browsing(width: int = 1200, height: int = 1500, *, dark: bool = False) -> Iterator[Any]:
    """A browser whose page is so many pixels wide, also below 500, where a window can't be; it keeps what pages log."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    try:
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield browser
    finally:
        browser.quit()
