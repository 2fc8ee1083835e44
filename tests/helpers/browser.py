"""A headless Chromium, driven by Playwright; tests that need it skip where it is absent."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator

import pytest

NAMES = ("chromium", "google-chrome")  # Debian's; that of CI's machines
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)


@contextlib.contextmanager
def opened() -> Iterator:
    """A browser context with an empty folder of its own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, NAMES)), None)
    if chromium is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    folder = tempfile.mkdtemp(prefix="arrag_chromium_")
    try:
        with playwright.sync_playwright() as driver:
            context = driver.chromium.launch_persistent_context(
                folder,
                executable_path=chromium,
                args=list(OPTIONS),
                headless=True,
                viewport={"width": 1280, "height": 900},
            )
            context.set_default_timeout(240_000)
            yield context
            context.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
