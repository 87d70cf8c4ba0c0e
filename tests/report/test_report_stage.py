"""What stands in the page, without a browser: samples, gaps, and that data cannot leave its place."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from report_runs import (
    HOSTILE,
    hostile_pairs,
    pair,
    refused_pairs,
    whole_run,
    write_created,
    write_recipe,
    write_rows,
    write_trained,
)

from anchored.contrast import contrast
from anchored.records import Outcome
from anchored.report.contents import Contents, Row
from anchored.report.pair_rows import MOST_ROWS, choices, for_page, sample, tally
from anchored.report.run_tables import run_tables
from anchored.report.stage import report
from anchored.runs import Run


def page_of(run: Run) -> str:
    assert report(run) == run.report
    return run.report.read_text("utf-8")


def data_of(page: str) -> dict:
    return json.loads(page.split('id="page-data">')[1].split("</script>")[0])


def sentences(page: str) -> str:
    """The page's own words: without scripts, tags and styles."""
    return re.sub(r"<[^>]*>", "", re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL))


def test_the_page_holds_the_texts_but_no_tag_of_theirs(tmp_path: Path) -> None:
    page = page_of(whole_run(tmp_path / "run"))
    rows = {row["id"]: row for row in data_of(page)["rows"]}
    for number, text in enumerate(HOSTILE):
        parts = rows[f"h{number}"]["parts"]
        assert "".join(words for kind, words in parts if kind != 2) == f"Well: {text} That is all."
        assert "".join(words for kind, words in parts if kind != 1) == f"Indeed: {text} That is truly all."
    assert page.count("<script") == page.count("</script") == 4
    for tag in ("<img", "<svg", "<iframe", "<b>", "<u>", "window.planted = 1</script>"):
        assert tag not in re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)


def test_a_page_of_the_same_run_is_the_same(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    assert page_of(run) == page_of(run)


def test_an_empty_folder_says_which_command_comes_first(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    folder.mkdir()
    page = page_of(Run(folder))
    text = sentences(page)
    for stage in ("create", "train", "evaluate"):
        assert f"anchored {stage} RECIPE --out &#39;{folder}&#39;" in text
    # no figure, no Plotly: it is most of a page's size
    assert len(page) < 100_000


def test_pairs_alone_say_how_to_go_on(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    write_created(run, refused_pairs())
    text = sentences(page_of(run))
    assert "10 clair pairs revised by big-teacher, not trained on yet" in text
    assert f"anchored train RECIPE --out {run.folder}" in text
    assert f"anchored evaluate RECIPE --out {run.folder}" in text
    assert "anchored create" not in text


@pytest.mark.parametrize(
    ("create", "says"),
    [
        ({"method": "judge-off-policy", "candidates": [{"model": "a"}], "answers": {"b": "f"}}, "judged by big-judge"),
        ({"method": "judge-off-policy", "judged": "data"}, "10 judge-off-policy pairs, not trained on yet"),
        ({"method": "clair", "team": [{"model": "ann"}, {"model": "bob"}, {"model": "ann"}]}, "revised by ann, bob"),
        ({"method": "stronger-preferred", "stronger": {"model": "best"}}, "won by answers of best"),
    ],
)
def test_who_taught_is_named(tmp_path: Path, create: dict, says: str) -> None:
    run = Run(tmp_path / "run")
    write_created(run)
    write_recipe(run, create={"judge": {"model": "big-judge"}, **create})
    run.complete("create", {"seconds": 12.0, "noticed": {"holds_verdict": 3}})
    text = sentences(page_of(run))
    assert says in text
    assert "holds_verdict 3" in text


def test_a_training_cut_short_shows_its_curves_and_how_it_goes_on(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    write_created(run)
    write_trained(run)
    (run.folder / "stages" / "train.json").unlink()
    page = page_of(run)
    assert "Training has not come to its end" in sentences(page)
    assert "train-loss" in {chart["id"] for chart in data_of(page)["charts"]}


def test_pairs_of_another_data_set_are_named(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    write_recipe(run, train={"data": "their pairs.jsonl", "objective": {"name": "dpo"}}, evaluate={"benchmarks": []})
    write_trained(run)
    run.trajectories.unlink()
    text = sentences(page_of(run))
    assert "aligned with dpo on the pairs of their pairs.jsonl" in text
    assert "anchored contrast &#39;their pairs.jsonl&#39;" in text
    assert "anchored create" not in text
    assert "No pairs were held out" in text
    assert "names no benchmark" in text


def test_lines_that_are_not_as_they_should_be_do_not_stop_the_report(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    with open(run.scores, "a") as handle:
        handle.write('{"checkpoint": "epoch-03"}\n[1]\n{"torn": ')
    with open(run.metrics, "a") as handle:
        handle.write('{"step": null, "loss": 3}\n{"step": "x"}\nnot json\n{"step": 81, "loss": -Infinity}\n')
    page = page_of(run)
    assert "epoch-03" not in page
    assert "1 steps have no finite value" in page


def test_a_long_text_is_cut_and_the_rest_counted() -> None:
    long = "word " * 25_000
    shown = for_page(Row(pair(long, long + "more"), "training"))
    assert sum(len(words) for kind, words in shown["parts"] if kind != 2) + shown["rejected_cut"] == len(long)
    assert sum(len(words) for kind, words in shown["parts"] if kind != 1) + shown["chosen_cut"] == len(long) + 4
    assert shown["rejected_cut"] > 0
    assert for_page(Row(pair("a", "b", rational=long), "training"))["rational"].endswith("… (105,000 more characters)")


def test_a_large_run_is_sampled_with_every_outcome_there() -> None:
    kept = [Row(pair(f"a{n}", f"b{n}"), "training") for n in range(5000)]
    often = [Row(pair(f"a{n}", f"c{n}", outcome=Outcome.LEAK), "refused") for n in range(3000)]
    seldom = [Row(pair("a", "d", outcome=Outcome.TIE), "refused")]
    rows = [*kept, *often, *seldom]
    first, again = sample(rows), sample(rows)
    counts = Counter(row.pair.outcome for row in first.rows)
    assert first == again
    assert (len(first.rows), first.of) == (MOST_ROWS, 8001)
    assert counts[Outcome.TIE] == 1
    assert counts[Outcome.OK] > counts[Outcome.LEAK] > 100
    places = [rows.index(row) for row in first.rows[:20]]
    assert places == sorted(places)


def test_few_rows_of_one_kind_leave_their_room_to_the_other() -> None:
    refused = [Row(pair(f"a{n}", f"c{n}", outcome=Outcome.LEAK), "refused") for n in range(2000)]
    kept = [Row(pair(f"a{n}", f"b{n}"), "training") for n in range(30)]
    counts = Counter(row.pair.outcome for row in sample([*refused, *kept]).rows)
    assert counts == {Outcome.OK: 30, Outcome.LEAK: MOST_ROWS - 30}


def test_huge_texts_make_a_shorter_page_not_a_larger_one() -> None:
    rows = [Row(pair(f"{n} " * 50_000, f"{n}! " * 50_000), "training") for n in range(MOST_ROWS)]
    refused = [Row(pair("x" * 50_000, "y" * 50_000, outcome=Outcome.LEAK), "refused")] * MOST_ROWS
    assert 100 < len(sample(rows).rows) < MOST_ROWS
    assert Counter(row.group for row in sample([*rows, *refused]).rows)["training"] > 50


def test_the_choices_count_the_rows_that_are_there() -> None:
    rows = [*(Row(one, "training") for one in hostile_pairs()), *(Row(one, "refused") for one in refused_pairs())]
    assert {choice.name: choice.rows for choice in choices(tally(rows))} == {
        "all": 14, "training": 10, "refused": 4, "length_ratio": 1, "leak": 1, "no_header": 1, "malformed": 1,
    }  # fmt: skip


@pytest.mark.parametrize("rows", [[], [pair("a", "b")]])
def test_empty_files_of_rows_are_no_trouble(tmp_path: Path, rows: list) -> None:
    run = Run(tmp_path / "run")
    write_recipe(run)
    for path in (run.pairs, run.held_out, run.refused):
        write_rows(path, rows if path == run.pairs else [])
    assert len(data_of(page_of(run))["rows"]) == len(rows)


def test_the_terminal_gets_the_tables_of_the_stages_it_ran(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    titles = [table.title for table in run_tables(run, ("create", "train", "evaluate", "report"))]
    assert titles == ["Yield", "Contrast", "Scores: pocket · 1 · grade", "Improvement on the starting model"]
    assert [table.title for table in run_tables(run, ("create",))] == ["Yield", "Contrast"]
    assert run_tables(Run(tmp_path / "none"), ("create", "evaluate")) == []


def test_the_contrast_is_what_the_stage_said_and_else_measured_anew(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    write_created(run)
    measured = Contents(run).contrasts
    assert measured["training"] == contrast(hostile_pairs())
    assert set(measured) == {"training", "held-out"}
    run.complete("create", {"contrast": {**asdict(measured["training"]), "leak_rate": 0.25}})
    again = Contents(run).contrasts
    assert again["training"].leak_rate == 0.25
    assert again["held-out"] == measured["held-out"]
    # of an older version, which measured less
    run.complete("create", {"contrast": {"tokenizer": "word", "jaccard": 1.0}})
    assert Contents(run).contrasts["training"] == replace(measured["training"], tokenizer="word")


def test_the_headline_is_start_best_and_last(tmp_path: Path) -> None:
    page = page_of(whole_run(tmp_path / "run"))
    tiles = re.findall(r'<span class="label">(.*?)</span><strong>(.*?)</strong>', page)
    assert tiles[:3] == [("Starting model", "40.0"), ("Best checkpoint", "55.0"), ("Last checkpoint", "50.0")]
    assert ("Accepted pairs", "12") in tiles
