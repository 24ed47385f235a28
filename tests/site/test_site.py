"""The built site as a reader meets it: whole, at home, readable on a phone, usable without a mouse."""

import json
import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import pytest
import yaml
from conftest import DESK, PAGES, PHONE, ROOT, SITE

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def source(path: str) -> str:
    """The HTML of a page, as built."""
    return (SITE / path).read_text(encoding="utf-8")


def test_every_page_of_the_contents_is_built(address):
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    files = [toc["root"]] + [page["file"] for part in toc["parts"] for page in part["chapters"]]
    assert sorted(f"{file}.html" for file in files) == PAGES


def test_page_loads_whole_and_asks_nobody_else(desk, path):
    """No error, nothing missing, nothing from another host; scripts only where needed; icons drawn."""
    assert desk.elsewhere == []
    assert desk.problems == []

    page = desk.page
    formulas = page.locator(".bd-article .math").count()
    assert any("mathjax" in url for url in desk.loaded) == (formulas > 0)
    assert any("embed.js" in url for url in desk.loaded) == (WIDGET_VIEW in source(path))
    assert page.locator(".bd-article .math mjx-container").count() == formulas
    assert page.locator("mjx-merror, mjx-mtext[style*='red']").count() == 0  # an error, an unknown command
    assert page.evaluate(
        "[...document.querySelectorAll('svg[data-icon]')].every(s => s.querySelector('path[d]'))"
    )
    assert page.locator("i[class*='fa-']:not(:has(svg))").count() == 0


def test_page_fits_a_phone(desk):
    """Nothing makes the page itself scroll sideways."""
    desk.page.set_viewport_size(PHONE)
    width = desk.page.evaluate("document.scrollingElement.scrollWidth")
    desk.page.set_viewport_size(DESK)
    assert width <= PHONE["width"]


def test_pictures_have_alt_text(desk):
    """An empty alt is for ornaments: the logo."""
    page = desk.page
    assert (
        page.evaluate("[...document.images].filter(i => !i.hasAttribute('alt')).map(i => i.outerHTML)") == []
    )
    silent = "[...document.querySelectorAll('.bd-article img')].filter(i => !i.alt.trim()).map(i => i.src)"
    assert page.evaluate(silent) == []


def test_alt_text_of_drawn_pictures_reaches_the_page(address):
    """From the cell's metadata, where the notebook tests look for it."""
    for notebook in (ROOT / "book").glob("*.ipynb"):
        page = source(f"book/{notebook.stem}.html")
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt")
            assert alt is None or f'alt="{escape(alt)}"' in page


# --- figures that move ------------------------------------------------------------------------------------

WITH_SLIDERS = [path for path in PAGES if WIDGET_VIEW in source(path)]
FIGURE = ".widget-vbox:has([role=slider])"


def test_chapters_have_figures_that_move(address):
    assert len(WITH_SLIDERS) >= 3


def frame(box) -> str:
    """What the figure's one visible picture shows."""
    shown = box.locator("img:visible")
    assert shown.count() == 1
    return shown.get_attribute("src")


@pytest.mark.parametrize("slider_page", WITH_SLIDERS)
def test_figures_move_by_keyboard_and_mouse(visit, slider_page):
    """One frame at a time, another for each position; the slider says its name, and its value in words."""
    page = visit().go(slider_page)
    assert page.locator(FIGURE).count() > 0
    for box in page.locator(FIGURE).all():
        handle, track, readout = (
            box.locator(at) for at in ("[role=slider]", ".noUi-base", ".widget-readout")
        )
        assert handle.get_attribute("aria-label")

        handle.focus()
        page.keyboard.press("Home")
        frames = [frame(box)]
        for _ in range(int(float(handle.get_attribute("aria-valuemax")))):
            page.keyboard.press("ArrowRight")
            frames.append(frame(box))
            assert handle.get_attribute("aria-valuetext") == readout.text_content()
        assert len(set(frames)) == len(frames) > 1

        wide = track.bounding_box()
        track.click(position={"x": 2, "y": wide["height"] / 2}, force=True)
        page.wait_for_timeout(400)  # the handle glides
        assert frame(box) == frames[0]
        at = handle.bounding_box()
        page.mouse.move(at["x"] + at["width"] / 2, at["y"] + at["height"] / 2)
        page.mouse.down()
        page.mouse.move(wide["x"] + wide["width"], at["y"] + at["height"] / 2, steps=4)
        page.mouse.up()
        assert frame(box) == frames[-1]


def test_sliders_are_large_enough_on_a_phone(visit):
    page = visit(viewport=PHONE, has_touch=True).go(WITH_SLIDERS[0])
    box = page.locator(FIGURE).first
    assert box.locator(".noUi-base").bounding_box()["width"] >= 180
    assert box.locator("img:visible").bounding_box()["width"] >= 330


# --- the theme's own tools --------------------------------------------------------------------------------


def test_search_finds_a_word(visit):
    window = visit()
    window.go("search.html?q=singular")
    window.page.wait_for_selector("#search-results li a", timeout=10_000)
    assert "01-svd-by-hand" in window.page.locator("#search-results").inner_html()
    assert window.problems == [] and window.elsewhere == []


def test_the_dark_switch_darkens_and_is_remembered(visit):
    window = visit(color_scheme="light")
    page = window.go(PAGES[0])
    seen = set()
    for _ in range(3):  # it goes round: light, dark, as the system
        page.locator("button.theme-switch-button").first.click()
        theme = page.evaluate("document.documentElement.dataset.theme")
        seen.add((theme, page.evaluate("getComputedStyle(document.body).backgroundColor")))
        if theme == "dark":
            page.reload()
            assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert {theme for theme, _ in seen} == {"light", "dark"}
    assert len({colour for _, colour in seen}) == 2


@pytest.mark.parametrize("slug", ["00-bottleneck", "01-svd-by-hand", "02-inside-a-real-cache"])
def test_chapter_opens_in_colab(slug):
    if not PAGES:
        pytest.skip("the site is not built: make book")
    link = f"https://colab.research.google.com/github/kvteach/kvteach/blob/main/book/{slug}.ipynb"
    assert link in source(f"book/{slug}.html")
    assert (ROOT / "book" / f"{slug}.ipynb").is_file()


# --- links ------------------------------------------------------------------------------------------------


class Anatomy(HTMLParser):
    """The ids of a page, what it links to, and what it would load."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids, self.links, self.assets = {""}, [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found.get("id"), found.get("name")}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif tag in ("script", "img", "iframe", "source", "link"):
            self.assets += filter(None, (found.get("src"), found.get("href")))


def test_links_inside_the_book_lead_somewhere(path):
    page = Anatomy(SITE / path)
    broken = []
    for link in page.links + page.assets:
        if urlsplit(link).scheme or link.startswith("//"):
            continue
        target, fragment = urldefrag(urljoin(f"/{path}", link))
        file = SITE / unquote(urlsplit(target).path).lstrip("/")
        file = file / "index.html" if file.is_dir() else file
        if not file.is_file():
            broken.append(link)
        elif fragment and file.suffix == ".html" and unquote(fragment) not in Anatomy(file).ids:
            broken.append(link)
    assert broken == []


def test_nothing_is_loaded_from_another_host(path):
    """Also what a browser would load only later, or only without scripts."""
    assert [a for a in Anatomy(SITE / path).assets if re.match(r"(https?:)?//", a)] == []
    assert not re.search(r"unpkg|jsdelivr|cdnjs|googleapis", source(path))
