"""A real browser, and what the tests of the page share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("NO BROWSER: the page is not tested; apt install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Open an address of a service. Afterwards no request may have failed or gone to another server."""
    context = browser.new_context()
    context.set_default_timeout(10_000)
    requested: list[str] = []
    failed: list[str] = []
    allowed: list[str] = []

    def run(url: str, viewport: Any = None) -> Page:
        page = context.new_page()
        if viewport:
            page.set_viewport_size(viewport)
        allowed.append(url.split("/", 3)[2])
        page.on("request", lambda request: requested.append(request.url))
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.on("console", lambda message: failed.append(message.text) if "Content Security" in message.text else None)
        page.goto(url)
        if page.locator("main[data-tab]").count():
            # A tab is hidden until its form is filled: only a script can touch its fields before.
            page.wait_for_selector("main:not([hidden])")
        return page

    yield run
    context.close()
    assert [url for url in requested if not url.startswith("data:") and url.split("/", 3)[2] not in allowed] == []
    assert failed == []
