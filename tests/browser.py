"""The browser in which tests look at pages."""

from __future__ import annotations

import shutil

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

NEEDS_A_BROWSER = [
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="the pages are looked at in a browser; `apt-get install chromium`, or put one of "
        f"{', '.join(BROWSERS)} on the PATH",
    ),
    # the browser's driver leaves its event loop to the garbage collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
