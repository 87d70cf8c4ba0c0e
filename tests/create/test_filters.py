"""Each filter by itself: what it refuses, with what words, and what it leaves; and filters of one's own."""

from __future__ import annotations

import gzip
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from anchored.create.filters import FILTERS, check, choose, filtered
from anchored.errors import RecipeError
from anchored.records import Answer, Outcome, Pair, user_prompt

DATA = Path(os.environ.get("ANCHORED_REAL_DATA") or Path(__file__).parents[3] / "shared" / "data")
INSTRUCTIONS = DATA / "alpaca_eval" / "instructions.jsonl.gz"


def pair(chosen: str, rejected: str = "An answer that was sampled.", prompt: str = "Why?") -> Pair:
    return Pair(user_prompt(prompt), Answer(chosen), Answer(rejected))


def refusal(found: Pair) -> tuple[str, str]:
    return str(found.outcome), found.detail


TEXT = "The sky is blue because air scatters short waves more than long ones, as Rayleigh showed in 1871. "
PROSE = " ".join(
    f"Point {number}: light of {400 + number} nm is scattered {number**4 % 97} times." for number in range(60)
)


@pytest.mark.parametrize(
    ("chosen", "one", "outcome", "says"),
    [
        ("Short.", "length_ratio", "length_ratio", "0.222 times as long as the rejected answer, not 0.5 to 2"),
        ("In this corrected solution, all is well.", "leak", "leak", "'In this corrected solution'"),
        ("An answer that was sampled.", {"jaccard": {"high": 90}}, "contrast", "Jaccard similarity 100.0, not 0 to 90"),
        ("Something else.", {"jaccard": {"low": 10}}, "contrast", "Jaccard similarity 0.0, not 10 to 100"),
        ("An answer that was sampled!", {"edit_share": {"low": 0.1}}, "contrast", "0.037 of the longer answer's"),
        ("x" * 30, {"edit_share": {"high": 0.9}}, "contrast", "1.000 of the longer answer's"),
        ("x" * 30, {"max_chars": {"most": 29}}, "too_long", "the chosen answer has 30 characters, more than 29"),
        ("Yes.\n" + "No.\n" * 10, "repetition", "repetition", "the same line 10 times in a row: 'No.'"),
        (PROSE + TEXT * 30, "repetition", "repetition", "repeats itself: 'The sky is blue|repeats itself: "),
        ("空は青い。" * 500, "repetition", "repetition", "repeats itself: '空は青い。"),
        ("A\x00B", "control_characters", "control_characters", "U+0000 (a control character) at character 1"),
        ("A\u202eB", "control_characters", "control_characters", "U+202E (RIGHT-TO-LEFT OVERRIDE) at character 1"),
        ("A\ufffdB", "control_characters", "control_characters", "U+FFFD (REPLACEMENT CHARACTER)"),
        (" <!DOCTYPE html>\n<html><h1>502</h1></html>", "html", "html", "the chosen answer is an HTML page"),
        ("```html\n<html></html>\n```", "html", "html", "the chosen answer is an HTML page"),
        ("I'm sorry, but I can't assist with that.", "refusal", "refusal", "the chosen answer: \"I'm sorry"),
    ],
)
def test_what_a_filter_refuses(chosen: str, one: object, outcome: str, says: str) -> None:
    found, detail = refusal(filtered(pair(chosen), [choose(one)]))
    assert found == outcome
    assert any(words in detail for words in says.split("|"))
    assert "\n" not in detail


@pytest.mark.parametrize(
    "chosen",
    [
        "An answer that I have sampled.",
        PROSE,
        "A\tB\r\nC\n\n" + "\n".join(f"| {number} | {number * number} |" for number in range(20)),
        "Ein Café, 東京, emoji 👩‍👩‍👧 and العربية.",
        "Use <b>bold</b> tags.",
    ],
)
def test_what_the_filters_of_single_answers_leave(chosen: str) -> None:
    names = ("max_chars", "repetition", "control_characters", "html", "refusal")
    assert filtered(pair(chosen), [choose(name) for name in names]).outcome is Outcome.OK


def test_a_page_that_was_asked_for_stays() -> None:
    page = "<!DOCTYPE html>\n<html><h1>Hi</h1></html>"
    assert filtered(pair(page, prompt="Write a web page that says Hi."), [choose("html")]).outcome is Outcome.OK


def test_the_rejected_answer_is_looked_at_when_asked() -> None:
    loop = "again and again " * 500
    one, both = choose("repetition"), choose({"repetition": {"answers": "both"}})
    assert filtered(pair("Fine.", loop), [one]).outcome is Outcome.OK
    assert refusal(filtered(pair("Fine.", loop), [both]))[1].startswith("the rejected answer repeats itself")


def test_the_first_filter_that_fails_names_the_outcome_and_none_looks_at_a_refused_pair() -> None:
    filters = [choose("control_characters"), choose("leak")]
    assert filtered(pair("In this corrected solution\x00"), filters).outcome is Outcome.CONTROL_CHARACTERS
    assert filtered(pair("In this corrected solution\x00"), filters[::-1]).outcome is Outcome.LEAK
    refused = Pair(user_prompt("a"), Answer("\x00"), Answer("b"), outcome=Outcome.TIE)
    assert filtered(refused, filters) is refused


def test_ten_megabytes_pass_every_filter_of_single_answers_in_seconds() -> None:
    started = time.process_time()
    for text in ("<" * 10_000_000, "x y " * 2_500_000, "\n" * 10_000_000, "<?xml" + " " * 10_000_000):
        for name in ("max_chars", "repetition", "control_characters", "html", "refusal", "length_ratio"):
            filtered(pair(text), [choose(name)])
    assert time.process_time() - started < 60


def test_every_row_of_the_table_has_a_default_that_can_be_named_bare() -> None:
    for name in FILTERS:
        assert filtered(pair("An answer that I have sampled."), [choose(name)]).outcome is Outcome.OK


def lines_of(file: Path) -> list[Any]:
    return [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]


@pytest.mark.skipif(not INSTRUCTIONS.exists(), reason=f"{INSTRUCTIONS} is missing (or set ANCHORED_REAL_DATA)")
def test_of_4830_real_answers_the_sanity_filters_refuse_next_to_none() -> None:
    instructions = [one["instruction"] for one in lines_of(INSTRUCTIONS)]
    filters = [choose(name) for name in ("max_chars", "repetition", "control_characters", "html")]
    refused = []
    for file in sorted(INSTRUCTIONS.parent.glob("outputs_*.jsonl.gz")):
        texts = zip(instructions, lines_of(file), strict=True)
        rows = [filtered(pair(answer, prompt=asked), filters) for asked, answer in texts]
        refused += [(file.name, row.outcome, row.detail) for row in rows if row.outcome is not Outcome.OK]
    assert len(refused) <= 15, refused


# filters of one's own

MODULE = '''
def short(pair, most=20):
    """Keeps short answers."""
    return f"{len(pair.chosen.text)} characters" if len(pair.chosen.text) > most else ""


def silent(pair):
    return None


def odd(pair):
    return 3


def broken(pair):
    return pair.no_such_field


limit = 3


def ends(pair):
    raise SystemExit(4)


async def late(pair):
    return ""
'''


@pytest.fixture
def _own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "my_filters.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("my_filters", None)


@pytest.mark.usefixtures("_own_module")
def test_a_filter_of_ones_own_says_in_words_what_is_wrong() -> None:
    chosen = choose("my_filters:short")
    check([chosen])
    assert refusal(filtered(pair("x" * 21), [chosen])) == ("own_filter", "my_filters:short: 21 characters")
    assert filtered(pair("x" * 20), [chosen]).outcome is Outcome.OK
    assert filtered(pair("x" * 21), [choose({"my_filters:short": {"most": 30}})]).outcome is Outcome.OK
    assert filtered(pair("x"), [choose("my_filters:silent")]).outcome is Outcome.OK


@pytest.mark.usefixtures("_own_module")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("my_filters:shrt", "create.filters is 'my_filters:shrt', but .*has no 'shrt'"),
        ("no_such_module:x", "create.filters is 'no_such_module:x', but there is no module"),
        ("my_filters:limit", "is a int; a filter is a function"),
        ("my_filters:late", "is a coroutine function; a filter is a function"),
    ],
)
def test_a_filter_that_cannot_be_had_is_found_before_anything_is_asked(name: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        check([choose(name)])


@pytest.mark.usefixtures("_own_module")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("my_filters:odd", "returned a int; it has to say in words"),
        ("my_filters:broken", r"fails on prompt \w+: AttributeError: .*no_such_field.*my_filters.py, line 16"),
        ("my_filters:ends", r"fails on prompt \w+: SystemExit: 4"),
    ],
)
def test_a_filter_that_fails_names_its_line_and_the_prompt(name: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        filtered(pair("x"), [choose(name)])
