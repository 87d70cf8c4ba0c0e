"""The page in a real browser: looking, finding, deciding; hostile texts stay texts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from inspected import Served, inspecting, served
from report_runs import HOSTILE, hostile_pairs, pair, refused_pairs, write_created, write_rows

from anchored.datasets_io import read_rows
from anchored.decisions import apply, read_decisions
from anchored.records import Outcome
from anchored.runs import Run

CONTROL_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"} | {0x7F: "␡"}


@dataclass
class Opened:
    """A page, who serves it, and all that it said and asked for."""

    page: Any
    served: Served
    said: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def place(self, expected: str) -> None:
        """Wait until the row at this place is shown, whole."""
        expect = _expect()
        expect(self.page.locator("#place")).to_have_text(expected)
        self.loaded()

    def loaded(self) -> None:
        """Wait until what was asked for is there."""
        _expect()(self.page.locator("#pair")).to_have_attribute("aria-busy", "false")
        _expect()(self.page.locator("#list [aria-busy]")).to_have_count(0)

    def decided(self, text: str) -> None:
        _expect()(self.page.locator("#progress")).to_contain_text(text)

    def pair_says(self, text: str) -> None:
        _expect()(self.page.locator("#pair")).to_contain_text(text)


def _expect() -> Any:
    from playwright.sync_api import expect

    return expect


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    write_created(run, refused_pairs())
    return run


@pytest.fixture
def opened(browser: Any, run: Run) -> Iterator[Opened]:
    with served(run.folder, run.decisions) as server:
        shown = open_page(browser, server)
        yield shown
        shown.page.context.close()
        assert shown.said == []


def open_page(
    browser: Any, server: Any = None, *, width: int = 1280, scheme: str = "light", address: str = ""
) -> Opened:
    page = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme).new_page()
    shown = Opened(page, server)
    page.on("console", lambda message: shown.said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: shown.said.append(f"page error: {error}"))
    page.on("request", lambda request: shown.requests.append(request.url))
    page.goto(address or server.server.address)
    return shown


def titles(opened: Opened) -> list[str]:
    return opened.page.locator("#list .entry .title").all_inner_texts()


def texts(opened: Opened, kind: str) -> str:
    return opened.page.locator(f"#pair .{kind} .text").evaluate("text => text.textContent")


def test_the_list_shows_every_row_with_outcome_and_numbers(opened: Opened) -> None:
    opened.place("1 of 16")
    assert len(titles(opened)) == 16
    entry = opened.page.locator("#row-0")
    assert re.fullmatch(r"ok\s+J \d+\s+× \d\.\d\d", entry.locator(".about").inner_text().strip())
    assert "held out" in opened.page.locator("#row-10").inner_text()
    assert "length_ratio" in opened.page.locator("#row-12").inner_text()
    assert opened.page.inner_text("#progress") == "0 of 16 decided"


def test_hostile_texts_stand_there_letter_by_letter_and_nothing_runs(opened: Opened) -> None:
    for place, row in enumerate(hostile_pairs(), 1):
        opened.place(f"{place} of 16")
        assert texts(opened, "rejected") == row.rejected.text.translate(CONTROL_PICTURES)
        assert texts(opened, "chosen") == row.chosen.text.translate(CONTROL_PICTURES)
        opened.page.keyboard.press("j")
    assert opened.page.evaluate("window.planted") is None
    assert (
        opened.page.evaluate("document.querySelectorAll('img, iframe, body script, svg, [onload], [onerror]').length")
        == 0
    )
    own = f"http://127.0.0.1:{opened.served.server.server_port}/"
    assert [url for url in opened.requests if not url.startswith(own)] == []


def test_the_policy_would_stop_what_got_through(browser: Any, run: Run) -> None:
    with served(run.folder, run.decisions) as server:
        opened = open_page(browser, server)
        planted = "<img src=x onerror='window.planted = 7'><a onclick='window.planted = 8'>x</a>"
        opened.page.evaluate("text => document.body.insertAdjacentHTML('afterbegin', text)", planted)
        opened.page.evaluate("document.querySelector('a[onclick]').click()")
        assert opened.page.evaluate("window.planted") is None
        assert opened.page.evaluate("fetch('http://127.0.0.1:1/').then(() => 'asked', () => 'stopped')") == "stopped"
        opened.page.context.close()


def test_filters_say_how_many_rows_they_leave_and_leave_them(opened: Opened) -> None:
    opened.place("1 of 16")
    assert opened.page.locator("#show option").all_inner_texts() == [
        "all rows (16)",
        "training pairs (10)",
        "held-out pairs (2)",
        "refused (4)",
        "refused: length_ratio (1)",
        "refused: leak (1)",
        "refused: no_header (1)",
        "refused: malformed (1)",
    ]
    opened.page.select_option("#show", "leak")
    opened.place("1 of 1")
    opened.pair_says("The student's answer, corrected")
    assert opened.page.locator("#pair .why").inner_text() == "The student's answer"
    opened.page.select_option("#show", "held-out")
    opened.place("1 of 2")
    opened.pair_says("held out")


def test_search_finds_texts_in_either_case_marks_them_and_says_when_there_is_none(opened: Opened) -> None:
    opened.place("1 of 16")
    opened.page.keyboard.press("/")
    opened.page.keyboard.type("WINDOW.PLANTED = 3")
    opened.place("1 of 1")
    opened.pair_says(HOSTILE[2])
    assert opened.page.evaluate("CSS.highlights.get('search').size") > 0
    opened.page.fill("#search", "no row has these words")
    _expect()(opened.page.locator("#pair")).to_have_text("No row says this.")
    _expect()(opened.page.locator("#count")).to_have_text("0 rows")
    opened.page.fill("#search", "")
    opened.place("1 of 16")


def test_order_by_jaccard_and_by_length_ratio(opened: Opened) -> None:
    opened.place("1 of 16")
    for order, mark, is_rising in (("unlike", "J", True), ("longer", "×", False)):
        opened.page.select_option("#order", order)
        opened.page.select_option("#show", "training")
        opened.place("1 of 10")
        about = [entry.split(mark)[1].split()[0] for entry in opened.page.locator("#list .about").all_inner_texts()]
        numbers = [float(number) for number in about]
        assert numbers == sorted(numbers, reverse=not is_rising)
        assert numbers[0] != numbers[-1]
        opened.page.select_option("#show", "")


def test_keys_turn_pages_decide_and_undo(opened: Opened, run: Run) -> None:
    opened.place("1 of 16")
    press = opened.page.keyboard.press
    press("ArrowDown")
    opened.place("2 of 16")
    press("j")
    opened.place("3 of 16")
    press("k")
    opened.place("2 of 16")
    press("d")
    opened.place("3 of 16")
    opened.decided("1 of 16 decided: 1 dropped")
    press("Shift+K")
    opened.place("4 of 16")
    opened.decided("2 of 16 decided: 1 kept, 1 dropped")
    assert "dropped" in opened.page.inner_text("#row-1")
    assert "kept" in opened.page.inner_text("#row-2")
    press("u")  # the row before, which was decided last
    opened.place("3 of 16")
    opened.decided("1 of 16 decided: 1 dropped")
    press("ArrowUp")
    opened.place("2 of 16")
    opened.pair_says("Dropped")
    press("u")
    opened.decided("0 of 16 decided")
    assert [line["decision"] for line in opened.served.lines()] == ["drop", "keep", "undo", "undo"]
    press("End")
    opened.place("16 of 16")
    press("j")
    opened.place("16 of 16")
    press("Home")
    opened.place("1 of 16")
    press("?")
    assert opened.page.locator("#help").is_visible()
    press("Escape")
    assert not opened.page.locator("#help").is_visible()


def test_a_decision_with_its_note_is_what_create_reads(opened: Opened, run: Run) -> None:
    opened.page.select_option("#show", "length_ratio")
    opened.place("1 of 1")
    opened.page.fill("#note", 'long but right <b>"x"</b>')
    opened.page.click("#keep")
    opened.pair_says('Kept: long but right <b>"x"</b>')
    assert opened.page.locator("#keep").get_attribute("aria-pressed") == "true"
    (row,) = [row for row in read_rows(run.refused) if row.outcome is Outcome.LENGTH_RATIO]
    kept = apply(row, read_decisions(run.decisions))
    assert kept.outcome is Outcome.OK
    assert kept.detail.startswith('kept by a person (long but right <b>"x"</b>), was: length_ratio (')
    # a note alone is saved with the decision that is there
    opened.page.fill("#note", "another note")
    opened.page.keyboard.press("Enter")
    opened.pair_says("Kept: another note")
    assert [line["note"] for line in opened.served.lines()] == ['long but right <b>"x"</b>', "another note"]


def test_what_cannot_be_kept_says_why(opened: Opened) -> None:
    opened.page.select_option("#show", "no_header")
    opened.place("1 of 1")
    assert opened.page.locator("#keep").is_disabled()
    opened.pair_says("Cannot be kept as it is: the chosen answer is empty")
    opened.page.keyboard.press("Shift+K")
    _expect()(opened.page.locator("#message")).to_contain_text("cannot be kept")
    assert opened.served.lines() == []
    opened.page.select_option("#show", "malformed")
    opened.pair_says("line 7: not a pair")
    _expect()(opened.page.locator("#edit")).to_be_disabled()


def test_an_edit_is_saved_shown_and_taken_back(opened: Opened, run: Run) -> None:
    opened.place("1 of 16")
    before = read_rows(run.pairs)[0]
    opened.page.keyboard.press("e")
    chosen = opened.page.locator("textarea[name=chosen]")
    assert chosen.input_value() == before.chosen.text
    new = "Indeed: <script>window.planted = 9</script> That is <i>all</i>."
    chosen.fill(new)
    opened.page.keyboard.press("j")  # types, and turns no page
    opened.page.keyboard.press("Control+Enter")
    opened.pair_says("Edited")
    assert texts(opened, "chosen") == new + "j"
    assert "teacher <b>+edited" in opened.page.inner_text("#pair .chosen h3")
    assert opened.page.locator("#pair summary").last.inner_text() == "What the edit changed in the revision"
    (line,) = opened.served.lines()
    assert (line["edited"], line["original"]) == ({"chosen": new + "j"}, {"chosen": before.chosen.text})
    assert apply(before, read_decisions(run.decisions)).chosen.text == new + "j"
    opened.page.keyboard.press("u")
    opened.decided("0 of 16 decided")
    assert texts(opened, "chosen") == before.chosen.text
    assert opened.page.evaluate("window.planted") is None


def test_an_edit_without_a_change_writes_nothing_and_one_with_changes_is_not_lost_unasked(opened: Opened) -> None:
    opened.place("1 of 16")
    opened.page.keyboard.press("e")
    opened.page.locator("textarea[name=rejected]").focus()
    opened.page.keyboard.press("Control+Enter")
    _expect()(opened.page.locator("textarea")).to_have_count(0)
    assert opened.served.lines() == []

    opened.page.keyboard.press("e")
    opened.page.locator("textarea[name=rejected]").fill("typed")
    questions: list[str] = []

    def answer(dialog: Any) -> None:
        questions.append(dialog.message)
        dialog.dismiss() if len(questions) == 1 else dialog.accept()

    opened.page.on("dialog", answer)
    opened.page.click("#row-5")
    _expect()(opened.page.locator("textarea[name=rejected]")).to_have_value("typed")
    opened.page.click("#row-5")
    opened.place("6 of 16")
    assert len(questions) == 2
    assert opened.served.lines() == []


def test_an_edit_that_leaves_no_pair_stays_open_and_says_why(opened: Opened) -> None:
    opened.place("1 of 16")
    opened.page.keyboard.press("e")
    opened.page.locator("textarea[name=chosen]").fill("")
    opened.page.click("form.editing .primary")
    _expect()(opened.page.locator("#message")).to_contain_text("the chosen answer is empty")
    assert opened.page.locator("textarea[name=chosen]").is_visible()
    opened.page.locator("textarea[name=chosen]").fill("Something.")
    opened.page.click("form.editing .primary")
    opened.pair_says("Edited")
    opened.said.clear()  # the browser's own line about the 400


def test_both_answers_in_one_text(opened: Opened) -> None:
    opened.page.fill("#search", "paragraph")
    opened.place("1 of 1")
    opened.page.keyboard.press("Escape")
    opened.page.keyboard.press("m")
    opened.page.locator("#search").evaluate("field => field.blur()")
    opened.page.click("#merge") if opened.page.locator("#pair .merged").count() == 0 else None
    assert opened.page.locator("#pair .merged del").all_inner_texts() == ["Well"]
    assert opened.page.locator("#pair .merged ins").all_inner_texts() == ["Indeed", " truly"]


def test_a_second_tab_sees_what_the_first_decided_and_nothing_is_lost(opened: Opened) -> None:
    opened.place("1 of 16")
    second = Opened(opened.page.context.new_page(), opened.served)
    second.page.goto(opened.served.server.address)
    second.place("1 of 16")
    opened.page.bring_to_front()
    opened.page.keyboard.press("d")
    opened.decided("1 dropped")
    second.page.bring_to_front()
    second.page.evaluate("window.dispatchEvent(new Event('focus'))")
    second.pair_says("Dropped")
    _expect()(second.page.locator("#row-0")).to_contain_text("dropped")
    second.page.keyboard.press("j")
    second.place("2 of 16")
    second.page.keyboard.press("Shift+K")
    second.decided("2 of 16 decided: 1 kept, 1 dropped")
    opened.page.bring_to_front()
    opened.place("2 of 16")
    opened.page.keyboard.press("d")
    opened.decided("2 of 16 decided: 2 dropped")
    assert [line["decision"] for line in opened.served.lines()] == ["drop", "keep", "drop"]


def test_no_decision_is_made_about_a_pair_that_is_not_shown_yet(opened: Opened) -> None:
    opened.place("1 of 16")
    held: list[Any] = []
    opened.page.route("**/api/pair*", lambda route: held.append(route))
    opened.page.keyboard.press("j")
    _expect()(opened.page.locator("#place")).to_have_text("2 of 16")
    opened.page.keyboard.press("d")
    _expect()(opened.page.locator("#message")).to_have_text("Not decided: this pair is still on its way.")
    held[0].continue_()
    opened.page.unroute("**/api/pair*")
    opened.place("2 of 16")
    opened.page.keyboard.press("d")
    opened.decided("1 of 16 decided: 1 dropped")


def test_a_pair_that_stands_there_twice_is_decided_about_once(browser: Any, tmp_path: Path) -> None:
    twice = pair("water is wet", "water is very wet", "p")
    write_rows(tmp_path / "pairs.parquet", [twice, pair("fire", "a fire", "q"), twice])
    with served(tmp_path, tmp_path / "decisions.jsonl") as server:
        opened = open_page(browser, server)
        opened.place("1 of 3")
        opened.page.keyboard.press("d")
        opened.decided("2 of 3 decided: 2 dropped")
        _expect()(opened.page.locator("#row-0")).to_contain_text("dropped")
        _expect()(opened.page.locator("#row-2")).to_contain_text("dropped")
        assert "dropped" not in opened.page.inner_text("#row-1")
        opened.page.context.close()


def test_without_the_token_the_page_shows_nothing_and_says_what_to_do(browser: Any, run: Run) -> None:
    with served(run.folder, run.decisions) as server:
        opened = open_page(browser, server, address=f"http://127.0.0.1:{server.server.server_port}/")
        _expect()(opened.page.locator("#message")).to_contain_text("open the address that `anchored inspect` printed")
        assert titles(opened) == []
        opened.page.context.close()


def test_when_the_server_ends_a_decision_is_not_taken_for_saved(browser: Any, run: Run) -> None:
    with inspecting(run.folder) as running:
        opened = open_page(browser, address=running.said[1])
        opened.place("1 of 16")
        assert running.end()[0] == 0
    opened.page.keyboard.press("d")
    _expect()(opened.page.locator("#message")).to_contain_text("The server has ended")
    assert opened.page.inner_text("#progress") == "0 of 16 decided"
    assert opened.page.inner_text("#place") == "1 of 16"
    opened.page.context.close()


def test_of_many_rows_only_those_in_sight_are_in_the_page(browser: Any, tmp_path: Path) -> None:
    write_rows(
        tmp_path / "pairs.parquet", [pair(f"text {number}", f"text {number}!", f"p{number}") for number in range(3000)]
    )
    with served(tmp_path, tmp_path / "decisions.jsonl") as server:
        opened = open_page(browser, server)
        opened.place("1 of 3,000")
        opened.page.keyboard.press("End")
        opened.place("3,000 of 3,000")
        _expect()(opened.page.locator("#row-2999 .title")).to_contain_text("text 2999")
        assert opened.page.locator("#list .entry").count() < 60
        opened.page.locator("#list").evaluate("list => { list.scrollTop = 60 * 1500; }")
        _expect()(opened.page.locator("#row-1503 .title")).to_contain_text("text 1503")
        assert opened.page.locator("#list .entry").count() < 60
        opened.page.click("#row-1503")
        opened.place("1,504 of 3,000")
        assert opened.said == []
        opened.page.context.close()


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_the_page_fits_a_phone_in_both_colours(browser: Any, run: Run, scheme: str) -> None:
    with served(run.folder, run.decisions) as server:
        opened = open_page(browser, server, width=390, scheme=scheme)
        page = opened.page
        opened.place("1 of 16") if page.locator("#place").is_visible() else None
        page.click("#row-2")
        assert page.locator("#pair").is_visible()
        assert not page.locator("#list").is_visible()
        assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
        page.click("#back")
        assert page.locator("#list").is_visible()
        assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        ink = page.evaluate("getComputedStyle(document.querySelector('.entry .title')).color")
        assert (brightness(paper) > 200) == (brightness(ink) < 100) == (scheme == "light")
        page.context.close()


def brightness(color: str) -> float:
    return sum(map(int, color.removeprefix("rgb(").removesuffix(")").split(", "))) / 3
