"""One browser and one server for all tests of the built site; skipped, with the reason, where one is missing.

Each page is opened once, and most tests look at it there.
"""

import shutil
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "book" / "_tools"))

import serve  # noqa: E402

SITE = serve.SITE
PAGES = sorted(page.relative_to(SITE).as_posix() for page in SITE.glob("book/*.html"))
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
FLAGS = [  # a browser that stays at home and runs in a container
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session", params=PAGES or ["not built"])
def path(request):
    """Each page in turn."""
    if not PAGES:
        pytest.skip("the site is not built: make book")
    return request.param


@pytest.fixture(scope="session")
def address():
    """The site, served on localhost."""
    if not PAGES:
        pytest.skip("the site is not built: make book")
    server = serve.server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="session")
def browser():
    """A Chromium that is installed on this machine; none is downloaded."""
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("no Chromium on this machine (Debian: apt install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


class Visit:
    """A page in a browser window, with everything that went wrong in it and everything that it asked for."""

    def __init__(self, browser, address: str, **window):
        self.address, self.problems, self.elsewhere, self.loaded = address, [], [], []
        self.context = browser.new_context(**{"viewport": DESK, **window})
        self.page = self.context.new_page()
        self.page.route("**/*", self._only_here)
        self.page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        self.page.on("console", self._heard)
        self.page.on("response", self._answered)

    def _only_here(self, route):
        here = route.request.url.startswith((self.address, "data:", "blob:"))
        if not here:
            self.elsewhere.append(route.request.url)
        route.continue_() if here else route.abort()

    def _heard(self, message):
        if message.type == "error":
            self.problems.append(f"console: {message.text}")

    def _answered(self, response):
        self.loaded.append(response.url)
        if response.status >= 400:
            self.problems.append(f"{response.status}: {response.url}")

    def go(self, path: str):
        """Open a page and wait until its formulas and widgets are there."""
        self.page.goto(self.address + path, wait_until="load")
        self.page.evaluate("() => window.MathJax?.startup?.promise")
        if self.page.query_selector("script[type='application/vnd.jupyter.widget-view+json']"):
            self.page.wait_for_selector(".jupyter-widgets [role=slider]", timeout=20_000)
        return self.page


@pytest.fixture(scope="session")
def desk(browser, address, path):
    """A page, opened in a wide window in the light theme. A test puts back what it changes."""
    window = Visit(browser, address, color_scheme="light")
    window.go(path)
    window.page.wait_for_load_state("networkidle")
    yield window
    window.context.close()


@pytest.fixture
def visit(browser, address):
    """Opens windows: visit(), or visit(viewport=PHONE, color_scheme="dark")."""
    opened = []

    def new(**window) -> Visit:
        opened.append(Visit(browser, address, **window))
        return opened[-1]

    yield new
    for one in opened:
        one.context.close()
