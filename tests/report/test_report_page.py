"""The page in a real browser: nothing runs, nothing is fetched, everything can be read."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from report_runs import hostile_pairs, pair, refused_pairs, whole_run, write_rows

from anchored.report.stage import report

CONTROL_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"} | {0x7F: "␡"}
# Playwright's own waiting needs eval, which the page forbids
UNTIL_FOLLOWED = """(scheme) => new Promise((done, fail) => {
    const began = performance.now(), curves = [...document.querySelectorAll('.chart .main-svg')];
    const narrow = () => curves.every((curve) => curve.getBoundingClientRect().width < 390);
    const ink = () => getComputedStyle(document.querySelector('#train-loss .xtick text')).fill;
    const coloured = () => matchMedia(`(prefers-color-scheme: ${scheme})`).matches
        && ink() === getComputedStyle(document.body).color;
    const look = () => narrow() && coloured() ? done()
        : performance.now() - began > 60000 ? fail(new Error(narrow() ? 'colours stay' : 'widths stay'))
        : requestAnimationFrame(look);
    look();
})"""


@dataclass
class Opened:
    """A page, and all that it said and asked for."""

    page: Any
    path: Path
    said: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def listener() -> Iterator[http.server.ThreadingHTTPServer]:
    """A server that the planted texts point to; `asked` holds what reached it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.asked.append(self.path)  # type: ignore[attr-defined]
            self.send_response(204)
            self.end_headers()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def opened(
    browser: Any, listener: http.server.ThreadingHTTPServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Opened]:
    run = whole_run(tmp_path_factory.mktemp("runs") / "a <script>window.planted=0<" / "script> run")
    call = f"http://127.0.0.1:{listener.server_address[1]}"
    asking = f'<img src="{call}/image"> <link rel=stylesheet href="{call}/style"> <iframe src="{call}/frame"></iframe>'
    write_rows(run.pairs, [*hostile_pairs(), pair(f"Look {asking} here", f"See {asking} here", "h-net")])
    shown = _open(browser, report(run), width=1280)
    yield shown
    shown.page.context.close()


def _open(browser: Any, path: Path, *, width: int, scheme: str = "light") -> Opened:
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    shown = Opened(page, path)
    page.on("console", lambda message: shown.said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: shown.said.append(f"page error: {error}"))
    page.on("request", lambda request: shown.requests.append(request.url))
    page.goto(path.as_uri())
    return shown


def _show(page: Any, group: str = "all", search: str = "") -> int:
    """Narrow the browser of pairs; how many rows it then holds."""
    page.select_option("#group", group)
    page.fill("#search", search)
    page.evaluate("document.activeElement.blur()")
    return int(page.inner_text("#place").split(" of ")[1])


def _texts(page: Any, kind: str) -> str:
    return page.evaluate(f"document.querySelector('#pair .{kind} .text')?.textContent ?? ''")


def _shown(text: str) -> str:
    return text.translate(CONTROL_PICTURES)


def test_the_browser_has_nothing_to_complain_of(opened: Opened) -> None:
    assert opened.said == []


def test_nothing_planted_runs_and_nothing_is_fetched(opened: Opened, listener: Any) -> None:
    for _ in range(_show(opened.page)):
        opened.page.keyboard.press("ArrowRight")
    assert opened.page.evaluate("window.planted") is None
    assert (
        opened.page.evaluate("document.querySelectorAll('main img, main iframe, main script, svg [onload]').length")
        == 0
    )
    assert [url for url in opened.requests if not url.startswith("file:")] == []
    assert listener.asked == []


def test_the_policy_would_stop_what_got_through(opened: Opened, browser: Any, listener: Any) -> None:
    call = f"http://127.0.0.1:{listener.server_address[1]}"
    page = _open(browser, opened.path, width=800).page
    outcome = page.evaluate(f"fetch('{call}/fetch').then(() => 'fetched', () => 'stopped')")
    late = f"<img src=x onerror='window.planted = 7'><img src='{call}/late'><a onclick='window.planted = 8'>x</a>"
    page.evaluate("late => document.body.insertAdjacentHTML('afterbegin', late)", late)
    page.click("a[onclick]")
    planted = page.evaluate("window.planted")
    page.context.close()
    assert (outcome, planted, listener.asked) == ("stopped", None, [])


def test_both_answers_stand_there_letter_by_letter(opened: Opened) -> None:
    rows = hostile_pairs()
    assert _show(opened.page, "training") == len(rows) + 1
    for row in rows:
        assert _texts(opened.page, "rejected") == _shown(row.rejected.text)
        assert _texts(opened.page, "chosen") == _shown(row.chosen.text)
        opened.page.keyboard.press("j")


def test_what_differs_is_marked_and_nothing_else(opened: Opened) -> None:
    assert _show(opened.page, "training", "paragraph") == 1
    assert opened.page.locator("#pair .rejected del").all_inner_texts() == ["Well"]
    assert opened.page.locator("#pair .chosen ins").all_inner_texts() == ["Indeed", " truly"]
    assert opened.page.locator("#pair .rejected ins, #pair .chosen del").count() == 0


def test_refused_rows_show_why_and_what_there_is(opened: Opened) -> None:
    for row in refused_pairs():
        assert _show(opened.page, str(row.outcome)) == 1
        text = opened.page.inner_text("#pair")
        assert str(row.outcome) in text
        assert row.detail in text
        assert row.rejected.text in text
        assert row.chosen.text in text
    assert _show(opened.page, "refused") == 4
    assert _show(opened.page, "held-out") == 2


def test_search_looks_in_all_texts_and_says_when_there_is_none(opened: Opened) -> None:
    assert _show(opened.page, "all", "WINDOW.PLANTED = 3") == 1
    assert _show(opened.page, "all", "window.planted = 6") == 1
    assert _show(opened.page, "training", "window.planted = 6") == 0
    assert "No row" in opened.page.inner_text("#pair")
    assert _show(opened.page, "all", "line 7: not a pair") == 1


def test_the_keyboard_turns_the_pages(opened: Opened) -> None:
    total = _show(opened.page)
    page = opened.page
    page.keyboard.press("ArrowRight")
    page.keyboard.press("j")
    assert page.inner_text("#place") == f"3 of {total}"
    page.keyboard.press("k")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#place") == f"1 of {total}"
    page.keyboard.press("/")
    page.keyboard.type("jjk")
    assert page.input_value("#search") == "jjk"
    page.fill("#search", "")


def test_the_least_alike_pair_comes_first_when_asked(opened: Opened) -> None:
    _show(opened.page, "training")
    opened.page.select_option("#order", "unlike")
    alike = []
    for _ in range(len(hostile_pairs())):
        text = opened.page.inner_text("#pair .meta")
        alike.append(float(text.split("Jaccard ")[1].split()[0]))
        opened.page.keyboard.press("j")
    opened.page.select_option("#order", "drawn")
    assert alike == sorted(alike)
    assert alike[0] < alike[-1]


def test_every_figure_is_drawn_with_its_axes_named(opened: Opened) -> None:
    axes = opened.page.evaluate(
        """[...document.querySelectorAll('.chart')].map((chart) =>
            [...chart.querySelectorAll('.xtitle, .ytitle')].map((title) => title.textContent))"""
    )
    assert len(axes) == 11
    assert all(len(titles) == 2 and all(titles) for titles in axes)
    panels = opened.page.evaluate(
        """['held-out-logp', 'held-out-reward'].map((id) =>
            [...document.getElementById(id).querySelectorAll('.legendtext')].map((entry) => entry.textContent))"""
    )
    assert panels == [["chosen", "rejected"], ["chosen", "rejected"]]


def test_the_histograms_of_the_contrast_hold_every_training_pair(opened: Opened) -> None:
    drawn = opened.page.evaluate(
        """['jaccard', 'distance', 'length-ratio'].map((id) => {
            const chart = document.getElementById(id);
            const bars = chart.querySelectorAll('.bars .point').length;
            return [bars, chart.data[0].y.reduce((one, other) => one + other), chart.data[0].x.every(isFinite)];
        })"""
    )
    assert all(bars > 0 for bars, _, _ in drawn)
    assert [pairs for _, pairs, _ in drawn] == [len(hostile_pairs()) + 1] * 3
    table = opened.page.inner_text("#data")
    for column in (
        "Jaccard ↑ (whitespace)",
        "normalised ↓",
        "length ratio",
        "shared prefix ↑",
        "of shorter ↑",
        "leaks ↓",
    ):
        assert column in table


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_the_page_fits_a_phone_in_both_colours(opened: Opened, scheme: str) -> None:
    page = opened.page
    page.set_viewport_size({"width": 390, "height": 844})
    page.emulate_media(color_scheme=scheme)
    page.evaluate(UNTIL_FOLLOWED, scheme)
    wider = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    # the curves follow the page when the colours change under an open one
    ink = page.evaluate("getComputedStyle(document.querySelector('#train-loss .xtick text')).fill")
    page.set_viewport_size({"width": 1280, "height": 900})
    assert wider <= 0
    assert (_brightness(paper) > 200) == (_brightness(ink) < 100) == (scheme == "light")
    assert opened.said == []


def _brightness(color: str) -> float:
    return sum(map(int, color.removeprefix("rgb(").removesuffix(")").split(", "))) / 3
