from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_mixeval import Answers

from anchored.errors import EvaluationError, ReplyError
from anchored.evaluate import statistics
from anchored.evaluate.benchmark import question_hash
from anchored.evaluate.questions import Questions
from anchored.evaluate.settings import EvaluateSettings
from anchored.evaluate.stage import Checkpoint, evaluate
from anchored.llm.chat import Chat
from anchored.progress import Silent
from anchored.recipe import shaping
from anchored.records import STRONGER
from anchored.report.compare import compare
from anchored.report.differences import differences
from anchored.runs import Run, read_lines


def test_two_benchmarks_of_one_name_are_refused_before_a_model_is_asked(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.jsonl").write_text('{"prompt": "x", "answer": "y"}')
    benchmarks = [Questions(tmp_path / folder / "test.jsonl") for folder in ("a", "b")]

    def open_chat(checkpoint: Checkpoint) -> Chat:
        raise AssertionError(checkpoint)

    run, start = Run(tmp_path / "run"), Checkpoint("start", 0, "nowhere")
    with pytest.raises(EvaluationError, match=r"two are named 'test'.*rename a file"):
        asyncio.run(evaluate(run, EvaluateSettings(), benchmarks, [start], open_chat, Silent(), {}))


def write_questions(path: Path, *asked: str) -> Questions:
    path.write_text("".join(json.dumps({"prompt": text, "answer": "yes"}) + "\n" for text in asked))
    return Questions(path)


def run_stage(
    folder: Path, benchmarks: list[Questions], answers: Mapping[str, Callable[[str], str]], **settings: Any
) -> dict[str, Any]:
    chosen = EvaluateSettings.model_validate({"resamples": 400, **settings})
    return asyncio.run(
        evaluate(
            Run(folder),
            chosen,
            benchmarks,
            [Checkpoint(name, step, name) for step, name in enumerate(answers)],
            lambda checkpoint: Answers(checkpoint.name, answers[checkpoint.name]),
            Silent(),
            {},
        )
    )


def right_at(*numbers: int) -> Callable[[str], str]:
    """Answers the questions of these numbers right."""
    return lambda text: "yes" if int(text.split()[-1]) in numbers else "no"


def test_a_checkpoint_chosen_on_one_benchmark_is_told_on_what_another_asks_alone(tmp_path: Path) -> None:
    # 0 to 9 choose; 5 to 24 tell, without the five that both ask
    first = write_questions(tmp_path / "first.jsonl", *(f"question {number}" for number in range(10)))
    second = write_questions(tmp_path / "second.jsonl", *(f"question {number}" for number in range(5, 25)))
    answers = {
        "start": right_at(0, 20),
        "epoch-01": right_at(*range(5), 10, 11),
        "epoch-02": right_at(*range(8), 12, 13, 14, 20, 21),
        "epoch-03": right_at(0, *range(8, 25)),
    }
    summary = run_stage(tmp_path / "run", [first, second], answers)
    [row] = summary["chosen"]
    assert (row["on"], row["benchmark"], row["checkpoints"]) == ("first", "second", ["epoch-02"])
    assert (row["n"], row["left_out"]) == (15, 5)
    assert row["gain"]["value"] == pytest.approx(100 * (5 - 1) / 15)
    assert row["score"] == pytest.approx(100 * 5 / 15)
    # two of them, chosen by the second: their mean
    summary = run_stage(tmp_path / "two", [first, second], answers, select={"on": "second", "take": 2})
    [row] = summary["chosen"]
    assert row["checkpoints"] == ["epoch-03", "epoch-02"]
    assert row["n"] == 5
    assert row["gain"]["value"] == pytest.approx(100 * ((1 + 5) / 2 - 1) / 5)


def test_what_is_set_otherwise_is_asked_again_and_what_leaves_nothing_is_said(tmp_path: Path) -> None:
    first = write_questions(tmp_path / "first.jsonl", *(f"question {number}" for number in range(10)))
    second = write_questions(tmp_path / "second.jsonl", *(f"Question\n {number}" for number in range(5, 25)))
    third = write_questions(tmp_path / "third.jsonl", *(f"QUESTION  {number}" for number in range(4)))
    answers = {"start": right_at(0), "epoch-01": right_at(*range(15))}
    summary = run_stage(tmp_path / "run", [first, second, third], answers)
    assert [(row["benchmark"], row["n"], row["left_out"]) for row in summary["chosen"]] == [("second", 15, 5)]
    assert summary["not_scored"] == {
        "first": [],
        "second": [],
        "third": ["no exact-match gain of what first chose: all 4 items ask what it asks as well"],
    }


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (("How many?",), ("how  many?\n",), True),
        (("How many?", "3", "4"), ("4", "How many?", "3"), True),  # choices in another order
        (("How many?", "3"), ("How many?", "4"), False),
        (("How many of 34?", "3"), ("How many of 34?", "4"), True),  # what the question holds tells nothing
        (("How many?", ""), ("How many?",), True),
        (("How many?",), ("How many ?",), False),
    ],
)
def test_a_question_is_known_however_it_is_set(one: tuple[str, ...], other: tuple[str, ...], same: bool) -> None:
    assert (question_hash(*one) == question_hash(*other)) == same


def test_every_checkpoint_has_its_paired_change(tmp_path: Path) -> None:
    asked = write_questions(tmp_path / "asked.jsonl", *(f"question {number}" for number in range(40)))
    answers = {"start": right_at(*range(20)), "epoch-01": right_at(*range(25)), "epoch-02": right_at(*range(10))}
    [row] = run_stage(tmp_path / "run", [asked], answers)["improvement"]
    starts, first = (np.array([float(place < most) for place in range(40)]) for most in (20, 25))
    expected = statistics.improvement(starts, first[None], 400, 0).last
    change = row["changes"]["epoch-01"]
    assert (change["value"], change["low"], change["high"]) == pytest.approx(
        (expected.value, expected.low, expected.high)
    )
    assert row["changes"]["epoch-02"]["value"] == pytest.approx(-25)
    [(name, behind)] = row["behind_best"].items()
    assert (name, row["max_checkpoint"]) == ("epoch-02", "epoch-01")
    second = np.array([float(place < 10) for place in range(40)])
    expected_behind = statistics.improvement(first, second[None], 400, 0).last
    assert (behind["value"], behind["low"], behind["high"]) == pytest.approx(
        (expected_behind.value, expected_behind.low, expected_behind.high)
    )
    with np.load(Run(tmp_path / "run").resamples) as npz:
        resampled = npz["asked\texact-match"]
    assert np.quantile(resampled[:, 1] - resampled[:, 0], 0.975) == pytest.approx(expected.high, abs=1e-4)


def test_a_gap_that_may_be_none_has_no_share(tmp_path: Path) -> None:
    asked = write_questions(tmp_path / "asked.jsonl", *(f"question {number}" for number in range(40)))
    answers = {STRONGER: right_at(*range(1, 21)), "start": right_at(*range(20)), "epoch-01": right_at(*range(25))}
    [row] = run_stage(tmp_path / "run", [asked], answers)["stronger"]
    assert row["gap"]["value"] == 0
    assert row["closed"] == {"epoch-01": None}
    answers[STRONGER] = right_at(*range(40))
    [row] = run_stage(tmp_path / "clear", [asked], answers)["stronger"]
    assert row["closed"]["epoch-01"]["value"] == pytest.approx(25)
    assert 0 < row["closed"]["epoch-01"]["low"] < 25 < row["closed"]["epoch-01"]["high"] < 60
    # 4 of 40, which 1 or 2 in 100 resamples leave out: what is come of nothing is no share
    answers[STRONGER] = right_at(*range(24))
    [row] = run_stage(tmp_path / "narrow", [asked], answers)["stronger"]
    assert row["gap"]["low"] > 0
    assert np.isfinite([*row["closed"]["epoch-01"].values()]).all()
    # without a checkpoint there is a gap, and nobody who closes it
    [row] = run_stage(tmp_path / "untrained", [asked], {name: answers[name] for name in (STRONGER, "start")})[
        "stronger"
    ]
    assert (row["gap"]["value"], row["closed"]) == (pytest.approx(10), {})
    # one that is surely worse is no aim
    answers[STRONGER] = right_at()
    [row] = run_stage(tmp_path / "worse", [asked], answers)["stronger"]
    assert row["gap"]["high"] < 0
    assert row["closed"] == {"epoch-01": None}


def test_an_empty_answer_has_a_length_and_one_that_could_not_be_had_has_none(tmp_path: Path) -> None:
    asked = write_questions(tmp_path / "asked.jsonl", *(f"question {number}" for number in range(4)))

    def fails_once(text: str) -> str:
        if text.endswith("3"):
            raise ReplyError("too long")
        return "yes"

    answers = {"start": fails_once, "epoch-01": lambda text: "" if text.endswith(("0", "3")) else "yes, yes"}
    summary = run_stage(tmp_path / "run", [asked], {**answers, "epoch-02": lambda _: ""})
    assert summary["lengths"]["asked"] == {"start": 3, "epoch-01": (8 + 8) / 4, "epoch-02": 0}
    changes = {name: change["value"] for name, change in summary["length_changes"]["asked"].items()}
    assert changes == pytest.approx({"epoch-01": (0 + 8 + 8) / 3 - 3, "epoch-02": -3})
    rows = read_lines(Run(tmp_path / "run").answers / "asked" / "start.jsonl")
    assert [row["answer"] for row in rows] == ["yes", "yes", "yes", None]


def test_models_that_share_no_graded_item_have_no_change_and_it_is_said(tmp_path: Path) -> None:
    asked = write_questions(tmp_path / "asked.jsonl", *(f"question {number}" for number in range(4)))

    def fails_at(*numbers: int) -> Callable[[str], str]:
        def say(text: str) -> str:
            if int(text.split()[-1]) in numbers:
                raise ReplyError("too long")
            return "yes"

        return say

    summary = run_stage(tmp_path / "run", [asked], {"start": fails_at(0, 1), "epoch-01": fails_at(2, 3)})
    assert summary["improvement"] == []
    [told] = summary["not_scored"]["asked"]
    assert told.startswith("no exact-match change: of 4 items none has a grade of both the starting model and epoch-01")
    assert {row["n"] for row in read_lines(Run(tmp_path / "run").scores)} == {2}


def test_the_benchmark_that_chooses_has_to_be_one_of_them(tmp_path: Path) -> None:
    asked = write_questions(tmp_path / "asked.jsonl", "question 1")
    with pytest.raises(EvaluationError, match=r"evaluate\.select\.on: 'other' is none of the benchmarks.* asked"):
        run_stage(tmp_path / "run", [asked], {"start": right_at()}, select={"on": "other"})


def test_a_comparison_pairs_what_the_stage_left_in_two_runs(tmp_path: Path) -> None:
    first = write_questions(tmp_path / "first.jsonl", *(f"question {number}" for number in range(30)))
    second = write_questions(tmp_path / "second.jsonl", *(f"question {number}" for number in range(100, 140)))
    start = right_at(*range(15), *range(100, 120))
    better = {
        "start": start,
        "epoch-01": right_at(*range(28), *range(100, 138)),
        "epoch-02": right_at(*range(100, 125)),
    }
    worse = {"start": start, "epoch-01": right_at(*range(9)), "epoch-02": right_at(*range(17), *range(95, 123))}
    for name, answers in (("apo-zero", better), ("dpo", worse)):
        run = Run(tmp_path / name)
        run_stage(run.folder, [first, second], answers)
        run.recipe.write_text(
            f"policy: {{model: m}}\ncreate: {{method: clair}}\ntrain: {{objective: {{name: {name}}}}}\n", "utf-8"
        )
    compared = compare([tmp_path / "dpo", tmp_path / "apo-zero"], shaping)
    found = differences(compared)
    assert found.notes == compared.notes == compared.left_out == ()
    assert [(field.sheet.benchmark, field.of) for field in found.fields] == [
        ("first", "mean"),
        ("second", "mean"),
        ("second", "chosen"),
    ]
    [pair] = found.fields[-1].pairs
    assert found.fields[-1].rows[pair.better].objective == "apo-zero"
    # on the first benchmark, epoch-01 of the one and epoch-02 of the other are best
    drawn = np.random.default_rng(0).multinomial(40, np.full(40, 1 / 40), size=400)
    gap = np.array([float(place < 38) - float(place < 23) for place in range(40)])
    ends = np.quantile(100 * drawn @ gap / 40, [0.025, 0.975])
    assert pair.points.value == pytest.approx(100 * 15 / 40)
    assert (pair.points.low, pair.points.high) == pytest.approx(tuple(ends), abs=1e-3)
    assert pair.holds_among_all


def test_what_one_checkpoint_lacks_costs_no_other(tmp_path: Path) -> None:
    asked = write_questions(tmp_path / "asked.jsonl", *(f"question {number}" for number in range(60)))
    right = {"start": range(20), "epoch-01": range(30), "epoch-02": range(5, 50)}
    lost: dict[str, set[int]] = {"start": {0}, "epoch-01": set(), "epoch-02": set(range(10, 40))}

    def answers(name: str) -> Callable[[str], str]:
        def say(text: str) -> str:
            if int(text.split()[-1]) in lost[name]:
                raise ReplyError("no luck")
            return right_at(*right[name])(text)

        return say

    summary = run_stage(tmp_path / "run", [asked], {name: answers(name) for name in right}, resamples=300)
    [row] = summary["improvement"]
    # of epoch-01 all but the start's lost one count, although epoch-02 lost half
    assert row["changes"]["epoch-01"]["value"] == pytest.approx(100 * (29 - 19) / 59)
    both = [number for number in range(1, 60) if number not in lost["epoch-02"]]
    gained = sum(number in right["epoch-02"] for number in both) - sum(number in right["start"] for number in both)
    assert row["changes"]["epoch-02"]["value"] == pytest.approx(100 * gained / len(both))
    assert row["n"] == len(both) == 29
    # by hand: the same draws of all questions, each change over its own pairs
    draws = statistics.draws(60, 300, 0).astype(float)
    for name in ("epoch-01", "epoch-02"):
        pairs = [number for number in range(1, 60) if number not in lost[name]]
        change = np.array([(number in right[name]) - (number in right["start"]) for number in pairs], float)
        resampled = 100 * draws[:, pairs] @ change / draws[:, pairs].sum(axis=1)
        low, high = np.quantile(resampled, [0.025, 0.975])
        assert (row["changes"][name]["low"], row["changes"][name]["high"]) == pytest.approx((low, high))
    assert row["mean"]["value"] == pytest.approx(np.mean([one["value"] for one in row["changes"].values()]))
