"""Tables and charts against numbers worked out by hand or in another way."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from report_runs import scores

from anchored.contrast import MeanContrast
from anchored.records import STRONGER, Outcome, Score
from anchored.report.charts import held_out_charts, histogram, score_chart, training_charts
from anchored.report.evaluated import Evaluated, Gain, Interval, Stronger
from anchored.report.scoreboard import scoreboards
from anchored.report.tables import (
    MEANINGS,
    contrast_table,
    duration,
    improvement_table,
    remarks_table,
    score_table,
    signed,
    yield_table,
)


def test_a_score_table_starts_with_the_starting_model_and_the_largest_category() -> None:
    lines = scores()
    random.Random(0).shuffle(lines)
    table = score_table(*scoreboards(lines))
    assert table.columns == ("checkpoint", "score", "95 %", "change", "dates", "<b>sums</b>")
    assert table.rows == (
        ("start", "40.0", "35.0–46.0", "", "60.0", "20.0"),
        ("epoch-01", "55.0", "50.0–61.0", "+15.0", "50.0", "60.0"),
        ("epoch-02", "50.0", "45.0–56.0", "+10.0", "60.0", "40.0"),
    )


def test_steps_order_the_checkpoints_not_their_names() -> None:
    names = {"epoch-9": 9, "epoch-10": 10, "start": 0, "a": 3}
    board, *_ = scoreboards(Score(name, step, "b", "1", "v", None, 1, 0, 2, 5, "") for name, step in names.items())
    assert board.checkpoints == ("start", "a", "epoch-9", "epoch-10")


def test_a_line_written_again_replaces_the_older_one_and_views_stay_apart() -> None:
    def line(view: str, score: float) -> Score:
        return Score("start", 0, "b", "1", view, None, score, 0, 100, 5, "")

    boards = scoreboards([line("win", 10), line("lc", 20), line("win", 30)])
    assert [(board.view, board.start and board.start.score) for board in boards] == [("win", 30), ("lc", 20)]


def test_without_a_starting_model_there_is_no_change() -> None:
    table = score_table(*scoreboards(score for score in scores() if score.checkpoint != "start"))
    assert [row[3] for row in table.rows] == ["", ""]


def test_the_best_checkpoint_is_the_earliest_of_equals() -> None:
    flat = [Score(f"e{step}", step, "b", "1", "v", None, 7.0, 6, 8, 5, "") for step in (3, 1, 2)]
    board, *_ = scoreboards(flat)
    assert board.best is not None
    assert board.best.checkpoint == "e1"


def test_shares_of_the_yield_add_up_with_the_kept_rows_first() -> None:
    table = yield_table(Counter({Outcome.LEAK: 3, Outcome.OK: 2, Outcome.EMPTY: 5}))
    assert [row[:3] for row in table.rows] == [("ok", "2", "20.0 %"), ("empty", "5", "50.0 %"), ("leak", "3", "30.0 %")]
    assert yield_table(Counter()).rows == ()


def test_every_outcome_is_explained() -> None:
    assert set(MEANINGS) == set(Outcome)


def test_the_contrast_table_names_the_tokenizer() -> None:
    mean = MeanContrast(1200, "word", 43.114, 1108.04, 0.3712, 1.0, 24.31, 0.0151, 0.0021)
    table = contrast_table({"mine.jsonl": mean})
    expected = ("mine.jsonl", "1,200", "43.11", "1,108.0", "0.371", "1.00", "24.3", "1.5 %", "0.2 %")
    assert table.rows == (expected,)
    assert len(table.columns) == len(expected)
    assert all(table.is_numeric(column) for column in range(1, len(expected)))
    assert any("word" in column for column in table.columns)


def test_improvements_keep_their_sign_and_interval() -> None:
    change = Interval(-1.25, -3.0, 0.5)
    gain = Gain("b", "v", None, change, "e", change, 2.0, change)
    table = improvement_table([gain, replace(gain, category="c", sd=0.0, changes={"e": change})])
    told = "−1.2 [−3.0, +0.5]"
    assert table.rows[0] == ("b · v", told, "e", told, "2.0", told)
    # one checkpoint has no spread
    assert table.rows[1] == ("b · v · c", told, "e", told, "", told)


def over_90(change: float, **changes: Interval) -> Gain:
    of = Interval(change, change - 2, change + 2)
    return Gain("pocket", "grade", None, of, "epoch-02", of, 1.0, Interval(7.5, 5, 9), 90, changes)


def test_a_change_is_the_paired_one_wherever_the_evaluation_tells_it() -> None:
    every = {"epoch-01": Interval(6.0, 4, 8), "epoch-02": Interval(7.5, 5, 9)}
    gap = Stronger("pocket", "grade", "large", Interval(31.0, 20, 40), {})
    lines = [*scores(), Score(STRONGER, 0, "pocket", "1", "grade", None, 80, 70, 90, 100, "")]
    board, *_ = scoreboards(lines, Evaluated(improvement=(over_90(7.5, **every),), stronger=(gap,)))
    table = score_table(board)
    assert [row[3] for row in table.rows] == ["", "+6.0", "+7.5", "+31.0"]
    assert "over the items that both have a grade for, at least 90" in table.note
    fewer = [replace(score, n=95) if score.checkpoint == "start" else score for score in lines]
    board, *_ = scoreboards([*fewer, replace(lines[-1], n=120)])
    assert score_table(board).note.startswith("Percent over 95 to 100 items; ")
    board, *_ = scoreboards(lines, Evaluated(improvement=(over_90(7.5, **every),), stronger=(gap,)))
    # the score of epoch-01 is the highest, over other items
    assert board.best is not None
    assert board.best.checkpoint == "epoch-02"
    assert score_chart(board, 0).data[0]["customdata"][2][3] == ", +7.5 points on the start"
    # older evaluations tell of the best and the last
    board, *_ = scoreboards(lines, Evaluated(improvement=(over_90(7.5),)))
    assert [row[3] for row in score_table(board).rows] == ["", "+15.0", "+7.5", "+40.0"]


def test_a_stronger_model_is_a_level_in_the_chart_and_no_step_of_training() -> None:
    judged = [replace(score, judge="mine") for score in scores()]
    lines = [*judged, replace(judged[0], checkpoint=STRONGER, score=80.0, judge="by nobody")]
    board, *_ = scoreboards(lines)
    assert board.judges == "mine"
    chart = score_chart(board, 0)
    points, level = chart.data
    assert points["x"] == sorted(points["x"])
    assert [label for label, *_ in points["customdata"]] == ["start", "epoch-01", "epoch-02"]
    assert (level["x"], level["y"]) == ([points["x"][0], points["x"][-1]], [80.0, 80.0])
    assert [label["text"] for label in chart.layout["annotations"]] == ["start 40.0", "stronger 80.0"]


def test_columns_of_numbers_stand_to_the_right() -> None:
    table = score_table(*scoreboards(scores()))
    assert [table.is_numeric(column) for column in range(len(table.columns))] == [False, True, True, True, True, True]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.96, "10.0 s"),
        (41.4, "41 s"),
        (59.7, "1 min"),
        (400, "6 min 40 s"),
        (45063, "12 h 31 min"),
        (7200, "2 h"),
    ],
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_difference_of_none_is_nothing() -> None:
    assert [signed(value) for value in (None, 0.0, 3.14, -3.16)] == ["", "+0.0", "+3.1", "−3.2"]


def test_a_long_curve_keeps_its_spikes() -> None:
    lines = [{"step": step, "grad_norm": 1.0 + (99.0 if step in (4321, 20001) else 0)} for step in range(1, 30001)]
    (chart,) = training_charts(lines)
    each_step = chart.data[0]
    assert len(each_step["x"]) < 2000
    assert [step for step, value in zip(each_step["x"], each_step["y"], strict=True) if value == 100] == [4321, 20001]
    assert (each_step["x"][0], each_step["x"][-1]) == (1, 30000)


def test_the_smooth_curve_is_the_mean_around_each_step() -> None:
    values = np.random.default_rng(0).normal(size=400)
    (chart,) = training_charts([{"step": step, "loss": value} for step, value in enumerate(values.tolist())])
    window = int(chart.data[1]["name"].removeprefix("mean of "))
    half = window // 2
    around = [values[max(0, step - half) : step + window - half].mean() for step in range(400)]
    assert window % 2 == 1
    assert chart.data[1]["y"] == pytest.approx(around, rel=1e-5, abs=1e-6)


def test_values_that_are_no_numbers_are_counted_and_left_out() -> None:
    lines = [{"step": step, "loss": math.nan if step % 5 == 0 else 2.0} for step in range(100)]
    (chart,) = training_charts(lines)
    assert chart.note == "20 steps have no finite value."
    assert {value for value in chart.data[1]["y"] if not math.isnan(value)} == {2.0}


def test_a_step_done_again_counts_once_as_it_was_last() -> None:
    lines = [
        {"step": step, "lr": step + run * 100} for run, steps in enumerate((range(5), range(3, 6))) for step in steps
    ]
    (chart,) = training_charts(lines)
    assert chart.data[0]["x"] == [0, 1, 2, 3, 4, 5]
    assert chart.data[0]["y"] == [0, 1, 2, 103, 104, 105]


def test_quantities_that_a_run_lacks_have_no_chart() -> None:
    assert training_charts([{"step": 1, "loss": None}, {"step": 2, "loss": "much"}, {"loss": 1.0}]) == []
    assert held_out_charts([]) == []


def test_held_out_panels_hold_chosen_and_rejected() -> None:
    lines = [{"step": step, "logp_chosen": -step, "logp_rejected": -2 * step} for step in (0, 5)]
    (chart,) = held_out_charts(lines)
    assert {trace["name"]: trace["y"] for trace in chart.data} == {"chosen": [0, -5], "rejected": [0, -10]}


def test_a_histogram_loses_no_pair_however_far_its_tail() -> None:
    values = [float(value) for value in range(990)] + [1e6] * 5 + [math.nan, math.inf]
    chart = histogram("levenshtein", "Levenshtein", "characters", values)
    assert chart is not None
    assert sum(chart.data[0]["y"]) == 995
    # 985 to 989 and the five far ones are the last hundredth
    assert "10 pairs above 984" in chart.note
    assert histogram("levenshtein", "Levenshtein", "characters", [math.nan]) is None


def test_one_value_alone_makes_a_histogram() -> None:
    chart = histogram("jaccard", "Jaccard", "percent", [100.0, 100.0], bounds=(0, 100))
    assert chart is not None
    assert sum(chart.data[0]["y"]) == 2


def test_names_from_outside_are_no_markup_in_a_chart() -> None:
    lines = [Score("<a href='x'>e</a>", 5, "b", "1", "v", None, 1, 0, 2, 5, "")]
    chart = score_chart(*scoreboards(lines), 0)
    assert chart.data[0]["customdata"][0][0] == "&lt;a href='x'&gt;e&lt;/a&gt;"


def test_remarks_are_counted_by_kind_and_checkpoint() -> None:
    found = {"hard": {"start": {"cut short": 3}, "epoch-01": {"without a verdict": 1200}}}
    table = remarks_table(found)
    assert table.columns == ("answers", "start", "epoch-01")
    assert table.rows == (("hard · cut short", "3", "0"), ("hard · without a verdict", "0", "1,200"))
    assert remarks_table({}).rows == ()
