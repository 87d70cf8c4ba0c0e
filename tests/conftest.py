"""What tests of several folders need."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from fault_server import FaultServer

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # started in the background of a shell: commands under test would inherit that nobody can interrupt them
    signal.signal(signal.SIGINT, signal.default_int_handler)


# not of the session: Playwright's loop would be in the way of tests that start one of their own
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless browser."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"needs a browser: none of {', '.join(names)} is on the PATH (Debian: apt-get install chromium)")
    api.expect.set_options(timeout=30_000)  # what is waited for comes at once, but for a busy machine
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture
def server() -> Iterator[FaultServer]:
    """An endpoint that plays a script."""
    with FaultServer() as server:
        yield server


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Back-off of at most 10 ms."""
    monkeypatch.setattr("anchored.llm.connection.LONGEST_BACKOFF", 0.01)
