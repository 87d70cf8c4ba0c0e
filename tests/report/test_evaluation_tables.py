"""What a run's own report and the terminal show of its evaluation beside the scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compared_runs import ME_0601, ME_0811, around, improvement, recipe, scored, write_run

from anchored.errors import DataError
from anchored.report.contents import Contents
from anchored.report.evaluated import read_evaluated
from anchored.report.evaluation_tables import breakdown_table, evaluation_tables
from anchored.report.run_tables import run_tables
from anchored.report.stage import report

SUMMARY: dict[str, Any] = {
    "checkpoints": ["start", "epoch-06", "epoch-07", "stronger"],
    "improvement": [
        improvement(ME_0601, "official", 5.0, 3.0, 1.0, changes={"epoch-07": around(5.0)})
        | {"behind_best": {"epoch-06": around(-1.5, 2.0)}},
        improvement(ME_0601, "official", 9.0, 3.0, 1.0, category="DROP", changes={"epoch-07": around(9.0, 8.0)}),
    ],
    "chosen": [
        {
            "on": ME_0601,
            "on_view": "official",
            "checkpoints": ["epoch-07"],
            "benchmark": ME_0811,
            "view": "official",
            "n": 844,
            "left_out": 156,
            "gain": around(2.5),
        }
    ],
    "stronger": [
        {
            "benchmark": ME_0601,
            "view": "official",
            "model": "gpt-4-turbo",
            "gap": around(17.0),
            "closed": {"epoch-06": around(12.0, 9.0), "epoch-07": around(45.0, 10.0)},
        },
        {
            "benchmark": ME_0811,
            "view": "official",
            "model": "gpt-4-turbo",
            "gap": around(0.5),
            "closed": {"epoch-06": None, "epoch-07": None},
        },
    ],
    "lengths": {ME_0601: {"start": 1200.0, "epoch-06": 1180.0, "epoch-07": 2400.4}},
    "length_changes": {ME_0601: {"epoch-06": around(-20.0, 5.0), "epoch-07": around(1200.4, 80.0)}},
    "notes": {
        ME_0601: {
            **{name: ["the data is not the official one"] for name in ("start", "epoch-06", "stronger")},
            "epoch-07": ["the data is not the official one", "61% of the answers are <b>longer</b>"],
        }
    },
    "not_scored": {"alpaca-eval": ["no length-controlled score: too few"]},
}


@pytest.fixture
def contents(tmp_path: Path) -> Contents:
    scores = [
        *scored(ME_0601, "official", 41.0, 46.0),
        *scored(ME_0601, "official", 50.0, 59.0, category="DROP", n=167),
    ]
    return Contents(write_run(tmp_path / "run", recipe("clair", "apo-zero"), scores, SUMMARY))


def test_every_part_of_the_evaluation_is_told(contents: Contents) -> None:
    found = {table.title: table.rows for table in evaluation_tables(contents.evaluated)}
    assert found == {
        "Before you trust these scores": (
            (ME_0601, "all", "the data is not the official one"),
            (ME_0601, "epoch-07", "61% of the answers are <b>longer</b>"),
            ("alpaca-eval", "", "no length-controlled score: too few"),
        ),
        "Chosen on one benchmark, reported on another": (
            (f"{ME_0811} · official", ME_0601, "epoch-07", "+2.5 [+0.5, +4.5]", "844", "156"),
        ),
        "Against the best checkpoint": (
            ("epoch-06", "−1.5 [−3.5, +0.5]"),
            ("epoch-07", "best"),
        ),
        "Gap to a stronger model": (
            (
                f"{ME_0601} · official",
                "gpt-4-turbo",
                "+17.0 [+15.0, +19.0]",
                "45 % [35, 55] (epoch-07)",
                "45 % [35, 55] (epoch-07)",
            ),
            (f"{ME_0811} · official", "gpt-4-turbo", "+0.5 [−1.5, +2.5]", "no gap to speak of", ""),
        ),
        "Length of the answers": (
            (ME_0601, "1,200", "+590", "+1,200 [+1,120, +1,280] (epoch-07)", "+1,200 [+1,120, +1,280] (epoch-07)"),
        ),
    }


def test_the_breakdown_has_the_best_checkpoint_with_paired_changes(contents: Contents) -> None:
    (board,) = contents.boards
    table = breakdown_table(board)
    assert table.columns[3] == "epoch-07"
    assert table.rows == (
        ("overall", "1,000", "41.0 [38.0, 44.0]", "46.0 [43.0, 49.0]", "+5.0 [+3.0, +7.0]"),
        ("DROP", "167", "50.0 [47.0, 53.0]", "59.0 [56.0, 62.0]", "+9.0 [+1.0, +17.0]"),
    )


def test_report_and_terminal_show_them(contents: Contents, browser: Any) -> None:
    titles = [table.title for table in run_tables(contents.run, ("evaluate",))]
    assert titles[-5:] == [table.title for table in evaluation_tables(contents.evaluated)]
    page = browser.new_page()
    page.goto(report(contents.run).as_uri())
    text = page.evaluate("document.getElementById('scores').textContent")
    page.close()
    for part in ("+2.5 [+0.5, +4.5]", "45 % [35, 55]", "+1,200 [+1,120", "<b>longer</b>", "+9.0 [+1.0, +17.0]"):
        assert part in text


def test_a_summary_of_an_older_version_has_empty_parts_and_a_wrong_one_is_named() -> None:
    assert evaluation_tables(read_evaluated({"seconds": 3.0, "improvement": []}, "x")) == []
    wrong = {**SUMMARY["chosen"][0], "gain": {**around(1.0), "low": "low"}}
    with pytest.raises(DataError, match=r"x: chosen.0.gain.low is 'low', .*evaluate again"):
        read_evaluated({"chosen": [wrong]}, "x")
