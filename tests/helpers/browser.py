"""A headless Chromium for tests of the page, or a reason to skip them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

BINARIES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--autoplay-policy=no-user-gesture-required",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # a page that wants the network gets an error
)


@contextmanager
def open_browser(profile: Path) -> Iterator[Chrome]:
    """A fresh browser; skips the test where there is none."""
    binary = next(filter(None, map(shutil.which, BINARIES)), None)
    chromedriver = shutil.which("chromedriver")
    if not binary or not chromedriver:
        pytest.skip("needs Chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = Chrome(options=options, service=Service(chromedriver))
    browser.set_script_timeout(120)
    try:
        yield browser
    finally:
        browser.quit()


def resize(browser: Chrome, width: int, *, dark: bool = False) -> None:
    """Set the width of the page in CSS pixels, and what the system says of the theme."""
    size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def wait(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    """Wait until a condition holds, and return what it gave; looks again where the page was drawn anew meanwhile."""
    end = time.monotonic() + seconds
    while True:
        with suppress(StaleElementReferenceException):
            if value := condition():
                return value
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)


def console_errors(browser: Chrome) -> list[str]:
    """What the console got since the last call, warnings and worse."""
    entries: list[dict[str, Any]] = browser.get_log("browser")
    return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]
