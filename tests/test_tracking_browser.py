"""Reports in a headless Chromium: nothing runs, loads or sticks out; hover, tap and Tab show a token's lists."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from made_up_runs import make_run
from PIL import Image

from opd_jax.analysis import dynamics
from opd_jax.tracking.report import write_report
from opd_jax.tracking.sections import write_analysis

pytestmark = [
    pytest.mark.browser,
    pytest.mark.exhaustive,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH (Debian: apt-get install chromium)"),
]
SIZES = ((1400, 900, False), (1400, 900, True), (400, 800, False), (400, 800, True))
TOKEN = "[...document.querySelectorAll('.samples pre span')][{}]"
SHOWN = "getComputedStyle({}, '::after').content"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The report of a run of 200 steps with its dynamics, one of two runs, and the page of an analysis."""
    root = tmp_path_factory.mktemp("runs")
    runs = [make_run(root / "good"), make_run(root / "flat", fails=True)]
    known = {"dynamics": dynamics.section}
    result = dynamics.dynamics(runs[:1])
    write_analysis(dynamics.section(result), result, runs[0].analysis)
    write_report(runs[0], root / "one.html", known)
    write_report(runs, root / "two.html", known)
    return {"one": root / "one.html", "two": root / "two.html", "analysis": Path(runs[0].analysis) / "dynamics.html"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.mark.parametrize("name", ["one", "two", "analysis"])
def test_pages_are_quiet_and_fit(name: str, pages: dict[str, Path], browser: Browser, tmp_path: Path) -> None:
    path = pages[name]
    assert path.stat().st_size < 5e6
    for width, height, dark in SIZES:
        browser.open(path, width, height, dark)
        assert browser.complaints() == []
        assert browser.requests() == [path.as_uri()]
        assert browser.value("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        # what is wider than its box scrolls in it, and no box is wider than the page
        widths = "[...document.querySelectorAll('main *:not(svg *)')].map(e => e.offsetWidth || 0)"
        assert max(browser.value(widths)) <= width
        assert not browser.value("[...document.querySelectorAll('script, img, iframe, link, object')].length")
        boxes = "[...document.querySelectorAll('figure svg')].map(e => e.getBoundingClientRect())"
        figures = browser.value(f"{boxes}.map(r => [r.width, r.height])")
        assert len(figures) > 5
        assert np.min(figures, axis=0).tolist() > [300, 180]  # on the narrow page, too
        browser.picture(tmp_path / "page.png")
        page = np.asarray(Image.open(tmp_path / "page.png").convert("L"), float)
        assert page.shape[1] == width
        assert (page[:, :3].mean() < 60) == dark
        assert page.std() > 10


def test_markup_of_a_model_is_text(pages: dict[str, Path], browser: Browser) -> None:
    browser.open(pages["one"], 1400, 900)
    assert "<script>alert(1)</script><img src=x onerror=alert(2)>" in browser.value("document.body.innerText")
    assert "<script>alert(1)</script><img src='http://evil.example/x.png'" in browser.value("document.body.innerText")


@pytest.mark.parametrize(("width", "how"), [(1400, "mouse"), (400, "tap"), (1400, "keyboard")])
def test_a_token_shows_what_both_sides_think(width: int, how: str, pages: dict[str, Path], browser: Browser) -> None:
    browser.open(pages["one"], width, 800, touch=how == "tap")
    reached = browser.value("[...document.querySelectorAll('.samples pre span')].findIndex(e => e.tabIndex == 0)")
    token = TOKEN.format(reached if how == "keyboard" else 40)
    browser.value(f"{token}.scrollIntoView({{block: 'center'}})")
    assert browser.value(SHOWN.format(token)) == "none"
    x, y = browser.value(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({token}.getClientRects()[0])")
    if how == "keyboard":
        browser.value("document.querySelector('.by-kl').focus()")
        for _ in range(5):  # a text that scrolls is reached, too
            browser.press("Tab", 9)
            if browser.value(f"document.activeElement == {token}"):
                break
    else:
        (browser.tap if how == "tap" else browser.move_to)(x, y)
    shown = browser.value(SHOWN.format(token))
    assert browser.value(f"{token}.dataset.t").split("\n")[1] in shown
    said = shown.replace("\xa0", " ")
    assert all(part in said for part in ("p 0.", "q 0.", "log q − log p", "KL", "student: ", "teacher: "))
    style = f"getComputedStyle({token}, '::after')"
    left, bottom, box = browser.value(f"[{style}.left, {style}.bottom, {style}.width]")
    assert (left, bottom) == ("12px", "12px")
    assert 150 < float(box.removesuffix("px")) <= width - 24
    assert browser.value("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_colours_can_be_those_of_the_reverse_kl(pages: dict[str, Path], browser: Browser) -> None:
    browser.open(pages["one"], 1400, 900)
    colours = "[...document.querySelectorAll('.samples pre span.p3.k1')].map(e => getComputedStyle(e).backgroundColor)"
    before = browser.value(colours)
    browser.value("document.querySelector('.by-kl').click()")
    after = browser.value(colours)
    assert before
    assert set(before) == {"rgba(0, 114, 178, 0.38)"}
    assert set(after) == {"rgba(213, 94, 0, 0.12)"}
