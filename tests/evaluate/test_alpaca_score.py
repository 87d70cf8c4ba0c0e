from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from alpaca_world import N, output_rows, save_world

from anchored.errors import EvaluationError
from anchored.evaluate import statistics
from anchored.evaluate.alpaca_files import AlpacaData, Annotation, read_data
from anchored.evaluate.alpaca_score import at_length, gain, leaderboard_row, overlap_of, score
from anchored.evaluate.length_control import JudgedRows, length_controlled, refit


@pytest.fixture
def data(tmp_path: Path) -> AlpacaData:
    return read_data(save_world(tmp_path / "data"))


def annotations(data: AlpacaData, n: int = N) -> list[Annotation]:
    """A judge that likes long answers, and the model a little."""
    rng = np.random.default_rng(3)
    rows = []
    for one, row in zip(data.instructions, output_rows(), strict=True):
        logit = 0.4 + (len(row["output"]) - len(one.baseline)) / 200 + rng.normal()
        preference = 1 + 1 / (1 + math.exp(-logit))
        rows.append(Annotation(one.text, one.baseline, row["output"], preference, "base", "mine", "judge"))
    return rows[:n]


def test_the_numbers_of_a_model(data: AlpacaData) -> None:
    rows = annotations(data)
    result = score(rows, data, resamples=300, seed=0)
    preference = np.array([one.preference for one in rows], dtype=float)
    gap = np.array([len(one.baseline) - len(one.answer) for one in rows], dtype=float)
    assert result.rates.win_rate == pytest.approx(100 * (preference.mean() - 1))
    assert result.win.value == pytest.approx(result.rates.win_rate)
    assert result.win.low < result.win.value < result.win.high
    assert data.difficulty is not None
    judged = JudgedRows(preference, gap, data.difficulty)
    assert result.controlled == length_controlled(judged, data.gamed)
    assert result.controlled is not None
    assert result.lc is not None
    spread = refit(judged, data.gamed, result.controlled.c, statistics.draws(len(judged.gap), 300, 0))
    left_out = [
        refit(judged, data.gamed, result.controlled.c, np.delete(np.eye(N, dtype=int), place, 0).sum(0)[None])[0]
        for place in range(N)
    ]
    assert result.lc == statistics.corrected(
        result.controlled.win_rate, spread, statistics.acceleration(np.array(left_out))
    )
    assert result.lc.low < result.lc.value == result.controlled.win_rate < result.lc.high
    assert (result.judged, result.failed, result.missing) == (N, 0, 0)
    assert result.mean_length == np.mean([len(one.answer) for one in rows])
    assert result.regression.startswith("df_gamed_small.csv")
    assert set(data.notes) <= set(result.notes)


def test_what_was_not_judged_is_counted_and_in_no_number(data: AlpacaData) -> None:
    rows = annotations(data)
    whole = [*rows[:30], *(replace(one, preference=None) for one in rows[30:40])]
    result = score(whole, data, 100, 0)
    assert (result.judged, result.failed, result.missing) == (30, 10, 20)
    assert "10 answers without a verdict and 20 instructions without an answer, of 60, are in no number" in result.notes
    alone = score(rows[:30], data, 100, 0)
    assert (alone.rates, alone.controlled, alone.mean_length) == (result.rates, result.controlled, result.mean_length)


def test_a_rate_that_is_all_penalty_is_said_to_be_none(data: AlpacaData) -> None:
    rows = [replace(one, preference=float(1 + (place % 3 > 0))) for place, one in enumerate(annotations(data, 8))]
    result = score(rows, data, 100, 0)
    assert result.controlled
    assert (result.rates.win_rate, result.controlled.win_rate) == (62.5, pytest.approx(50, abs=0.1))
    assert any("on 8 judged instructions" in note and "strongest penalty" in note for note in result.notes)
    assert not any("penalty" in note for note in score(annotations(data), data, 100, 0).notes)


def test_rows_keep_the_difficulties_of_their_instructions(data: AlpacaData) -> None:
    # the official package takes the row's number for the instruction's, and so errs where rows are missing
    rows = annotations(data)[20:]
    result = score(rows, data, 100, 0)
    preference = np.array([one.preference for one in rows], dtype=float)
    gap = np.array([len(one.baseline) - len(one.answer) for one in rows], dtype=float)
    assert result.controlled == length_controlled(JudgedRows(preference, gap, data.difficulty[20:]), data.gamed)


def test_the_baseline_against_itself_is_one_half(data: AlpacaData) -> None:
    rows = [Annotation(one.text, one.baseline, one.baseline, 1.5, "base", "base") for one in data.instructions]
    result = score(rows, data, 100, 0)
    assert (result.rates.win_rate, result.rates.draws) == (50, N)
    assert result.controlled is not None
    assert result.controlled.win_rate == 50


def test_a_rate_that_cannot_be_controlled_is_left_out_and_said(data: AlpacaData) -> None:
    rows = [replace(one, answer=one.baseline + "x" * 40) for one in annotations(data)]
    result = score(rows, data, 100, 0)
    assert result.controlled is None
    assert result.lc is None
    assert any("no length-controlled rate: every answer is 40 characters" in note for note in result.notes)
    assert result.rates == score(annotations(data), data, 100, 0).rates


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda rows: [], "there is no annotation"),
        (lambda rows: [replace(one, preference=None) for one in rows], "no instruction was judged"),
        (lambda rows: [*rows[:5], replace(rows[5], model="yours")], "of 2 models"),
    ],
)
def test_nothing_is_scored_that_is_no_model(
    data: AlpacaData, rows: Callable[[list[Annotation]], list[Annotation]], message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        score(rows(annotations(data)), data, 100, 0)


def test_overlap_of_lengths() -> None:
    gap = np.concatenate([np.full(30, 500.0), np.full(10, 0.0), np.full(60, -1000.0)])
    overlap = overlap_of(gap)
    assert (overlap.shorter, overlap.longer) == (0.3, 0.6)
    assert overlap.shift == pytest.approx(450 / np.std(gap))
    assert not overlap.extrapolates
    assert overlap.warning == ""


def test_equal_lengths_are_an_overlap() -> None:
    overlap = overlap_of(np.r_[np.zeros(98), 5.0, -5.0])
    assert (overlap.shorter, overlap.longer, overlap.extrapolates) == (0.01, 0.01, False)


@pytest.mark.parametrize(("factor", "side"), [(3.0, "longer"), (0.2, "shorter")])
def test_a_rate_that_extrapolates_is_warned_of(data: AlpacaData, factor: float, side: str) -> None:
    rows = [replace(one, answer="a" * int(factor * len(one.baseline))) for one in annotations(data)]
    rows[0] = replace(rows[0], answer=rows[0].baseline)
    result = score(rows, data, 100, 0)
    assert result.overlap.extrapolates
    [said] = [note for note in result.notes if "extrapolates" in note]
    assert said.startswith(f"98% of the answers are {side} than the baseline's")


def test_the_leaderboards_columns(data: AlpacaData) -> None:
    result = score(annotations(data), data, 100, 0)
    row = leaderboard_row(result)
    assert row["n_wins"] == result.rates.wins
    assert (row["n_total"], row["avg_length"]) == (N, int(result.mean_length))
    assert result.controlled is not None
    assert row["length_controlled_winrate"] == result.controlled.win_rate


def better(rows: list[Annotation], by: float) -> list[Annotation]:
    """The same answers, each liked more."""
    return [replace(one, preference=min(2.0, (one.preference or 1.5) + by)) for one in rows]


def test_improvements_are_of_rates_over_shared_instructions(data: AlpacaData) -> None:
    start = annotations(data)
    one, other = better(start, 0.05), better(start, 0.1)
    one[3] = replace(one[3], preference=None)
    got = gain(start, [one, other], data, 300, 0)
    assert got.judged == N - 1
    kept = [[*rows[:3], *rows[4:]] for rows in (start, one, other)]
    alone = [score(rows, data, 300, 0) for rows in kept]
    win = [result.rates.win_rate - alone[0].rates.win_rate for result in alone[1:]]
    lc = [result.lc.value - alone[0].lc.value for result in alone[1:] if result.lc and alone[0].lc]
    for improvement, gains in ((got.win, win), (got.lc, lc)):
        assert improvement is not None
        assert improvement.max.value == pytest.approx(max(gains))
        assert improvement.mean.value == pytest.approx(np.mean(gains))
        assert improvement.sd == pytest.approx(np.std(gains, ddof=1))
        assert (improvement.last.value, improvement.max_checkpoint) == (pytest.approx(gains[-1]), 1)
        assert improvement.last.low > 0
    # the same instructions are drawn for all: far surer than the rate itself
    assert got.lc is not None
    assert alone[0].lc is not None
    assert got.lc.last.high - got.lc.last.low < (alone[0].lc.high - alone[0].lc.low) / 3


def test_improvements_need_shared_instructions(data: AlpacaData) -> None:
    rows = annotations(data)
    with pytest.raises(EvaluationError, match="no instruction was judged for every model"):
        gain(rows[:20], [rows[20:]], data, 100, 0)


def test_improvements_without_length_control_have_win_rates_alone(data: AlpacaData) -> None:
    rows = annotations(data)
    constant = [replace(one, answer=one.baseline + "x" * 40) for one in rows]
    got = gain(rows, [constant], data, 100, 0)
    assert got.lc is None
    assert got.win.last.value == 0


def test_answers_at_another_length_are_asked_for_and_help_to_tell_what_length_does(data: AlpacaData) -> None:
    long = [replace(one, answer="a" * (400 + 3 * len(one.baseline))) for one in annotations(data)]
    alone = score(long, data, 200, 0)
    assert alone.overlap.extrapolates
    asked = at_length(data.instructions[0], alone.overlap).messages[0].content
    assert asked.startswith("Question 0?\n\nGive a shorter answer than you otherwise would, of about 1 words.")
    short = [replace(one, answer=one.baseline[:-5], preference=1.2) for one in long[:50]]
    helped = score(long, data, 200, 0, again=short)
    assert helped.controlled != alone.controlled
    assert (helped.rates, helped.win, helped.mean_length) == (alone.rates, alone.win, alone.mean_length)
    assert helped.overlap == alone.overlap
    assert not any("extrapolates" in note for note in helped.notes)
    assert "length control includes 50 judged answers that were asked for at another length" in helped.notes
    # a model gains nothing on itself, whatever was asked again
    got = gain(long, [long], data, 100, 0, again=[short, short])
    assert got.lc is not None
    assert (got.lc.last.value, got.lc.last.low, got.lc.last.high) == (0, 0, 0)
    apart = gain(long, [long], data, 100, 0, again=[[], short])
    assert apart.lc is not None
    assert alone.controlled is not None
    assert helped.controlled is not None
    assert apart.lc.last.value == pytest.approx(helped.controlled.win_rate - alone.controlled.win_rate)


def test_a_short_model_is_asked_for_longer_answers(data: AlpacaData) -> None:
    short = [replace(one, answer="a") for one in annotations(data)]
    asked = at_length(data.instructions[0], score(short, data, 100, 0).overlap).messages[0].content
    assert "Give a longer answer" in asked
