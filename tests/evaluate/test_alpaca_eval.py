"""AlpacaEval through the stage: the numbers of its own arithmetic, over checkpoints, from chats that answer by rule."""

from __future__ import annotations

import asyncio
import csv
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alpaca_world import N, instruction, output_rows, save_world
from small_mixeval import Answers, Heard
from test_alpaca_judge import Judge, likes_long

from anchored.errors import EvaluationError, ReplyError
from anchored.evaluate.alpaca_eval import AlpacaEval
from anchored.evaluate.alpaca_files import (
    AlpacaData,
    Annotation,
    Outputs,
    read_annotations,
    read_data,
    read_outputs,
)
from anchored.evaluate.alpaca_judge import judge
from anchored.evaluate.alpaca_score import gain, leaderboard_row, score
from anchored.evaluate.benchmark import Answered
from anchored.evaluate.settings import AlpacaJudging, EvaluateSettings
from anchored.evaluate.stage import Checkpoint, evaluate
from anchored.llm.chat import Chat, Reply
from anchored.records import STRONGER
from anchored.runs import Run, read_lines

NAME = "alpaca-eval"
GIVEN = {row["instruction"]: row["output"] for row in output_rows()}


def longer(text: str) -> str:
    return GIVEN[text] + "a" * 60


def by_wish(text: str) -> str:
    """Far too long, unless a shorter answer is asked for."""
    question, _, wish = text.partition("\n\n")
    return "s" * (40 + len(question) + 7 * (int(question[9:-1]) % 9)) if wish else GIVEN[text] + "a" * 900


def likes_some(texts: list[str]) -> Reply:
    """Graded: it likes the model's answers, which are made of a, to some questions more than to others."""
    question, _, second = texts
    rate = 0.35 + 0.6 * random.Random(question).random()
    rate = rate if second[0] == "a" else 1 - rate
    tokens = {"m": math.log(1 - rate), "M": math.log(rate)}
    return Reply("M", "length", "judge-1", logprobs=(tokens,))


def settings(world: Path, **alpaca: Any) -> EvaluateSettings:
    judge = {"model": "judge", "base_url": "http://127.0.0.1:9/v1", "most_failed": alpaca.pop("most_failed", 0.05)}
    return EvaluateSettings.model_validate(
        {"resamples": 300, "judge": judge, "alpaca": {"data": str(world), **alpaca}, "seed": 3}
    )


def run_stage(
    folder: Path,
    chosen: EvaluateSettings,
    answers: Mapping[str, Callable[[str], str]],
    says: Callable[[list[str]], Reply | Exception] = likes_long,
    progress: Heard | None = None,
) -> dict[str, Any]:
    def open_chat(checkpoint: Checkpoint) -> Chat:
        return Answers(checkpoint.name, answers[checkpoint.name])

    checkpoints = [Checkpoint(name, step, name) for step, name in enumerate(answers)]
    judges = {NAME: Judge(says)}
    return asyncio.run(
        evaluate(Run(folder), chosen, [AlpacaEval(chosen)], checkpoints, open_chat, progress or Heard(), judges)
    )


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return save_world(tmp_path / "data")


def scores(folder: Path) -> dict[tuple[str, str, str | None], dict[str, Any]]:
    return {(row["checkpoint"], row["view"], row["category"]): row for row in read_lines(Run(folder).scores)}


def test_the_stage_has_the_numbers_of_the_exported_annotations(tmp_path: Path, world: Path) -> None:
    run, data = tmp_path / "run", read_data(world)
    summary = run_stage(run, settings(world), {"start": GIVEN.__getitem__, "epoch-01": longer})
    found = scores(run)
    annotated = {}
    for name in ("start", "epoch-01"):
        folder = Run(run).answers / NAME / name
        assert read_outputs(folder / "model_outputs.json", data).missing == 0
        annotated[name] = read_annotations(folder / "annotations.json")
        expected = score(annotated[name], data, 300, seed=3)
        assert expected.lc is not None
        for view, interval in (("length-controlled", expected.lc), ("win-rate", expected.win)):
            row = found[name, view, None]
            assert (row["score"], row["low"], row["high"]) == pytest.approx(
                (interval.value, interval.low, interval.high)
            )
        assert found[name, "discrete", None]["score"] == pytest.approx(expected.rates.discrete_win_rate)
        [row] = csv.DictReader((folder / "leaderboard.csv").read_text().splitlines())
        assert {key: value or None for key, value in row.items()} == {
            key: None if value is None else str(value) for key, value in leaderboard_row(expected).items()
        }
        assert found[name, "length-controlled", None]["judge"].endswith("order 0, read by log-probabilities")
    paired = gain(annotated["start"], [annotated["epoch-01"]], data, 300, seed=3)
    assert paired.lc is not None
    rows = {row["view"]: row for row in summary["improvement"] if row["category"] is None}
    for view, improvement in (("length-controlled", paired.lc), ("win-rate", paired.win)):
        last = rows[view]["last"]
        assert (last["value"], last["low"], last["high"]) == pytest.approx(
            (improvement.last.value, improvement.last.low, improvement.last.high)
        )
        assert rows[view]["changes"]["epoch-01"] == pytest.approx(last)
    assert summary["lengths"][NAME]["epoch-01"] - summary["lengths"][NAME]["start"] == pytest.approx(60)
    assert summary["length_changes"][NAME]["epoch-01"] == pytest.approx({"value": 60, "low": 60, "high": 60})
    assert any("in place of the official df_gamed.csv" in note for note in summary["notes"][NAME]["start"])


def test_what_is_not_judged_is_counted_and_costs_no_pairing(tmp_path: Path, world: Path) -> None:
    # in one run the judge fails at a question: the draws are the same, so resamples still belong together
    run_stage(tmp_path / "whole", settings(world), {"start": GIVEN.__getitem__}, likes_some)

    def fails_at_one(texts: list[str]) -> Reply | Exception:
        return Reply("neither", "stop", "judge-1") if texts[0] == instruction(7) else likes_some(texts)

    summary = run_stage(tmp_path / "part", settings(world), {"start": GIVEN.__getitem__}, fails_at_one)
    assert summary["ungraded"] == 1
    assert summary["remarks"][NAME]["start"] == {"without a verdict": 1}
    assert scores(tmp_path / "part")["start", "length-controlled", None]["n"] == N - 1
    one, other = (np.load(Run(tmp_path / name).resamples) for name in ("whole", "part"))
    assert bytes(one["meta"]) == bytes(other["meta"])
    for view in ("length-controlled", "win-rate"):
        pair = [npz[f"{NAME}\t{view}"][:, 0] for npz in (one, other)]
        assert np.corrcoef(pair[0], pair[1])[0, 1] > 0.95


def test_a_judge_that_is_of_no_use_ends_the_evaluation(tmp_path: Path, world: Path) -> None:
    with pytest.raises(EvaluationError, match=r"alpaca-eval: judge gave no verdict on 60 of 60 answers.*'雨'"):
        run_stage(
            tmp_path / "run",
            settings(world),
            {"start": GIVEN.__getitem__},
            lambda _: Reply("雨", "stop", "judge-1"),
        )


def test_answers_that_never_come_near_the_baselines_length_are_asked_for_again(tmp_path: Path, world: Path) -> None:
    plain = run_stage(tmp_path / "plain", settings(world), {"start": by_wish})
    assert any("extrapolates" in note for note in plain["notes"][NAME]["start"])
    progress = Heard()
    again = run_stage(tmp_path / "again", settings(world, ask_again=True), {"start": by_wish}, progress=progress)
    assert progress.steps["alpaca-eval: start, asked again"] == N
    one, other = scores(tmp_path / "plain"), scores(tmp_path / "again")
    for view in ("win-rate", "discrete"):
        assert one["start", view, None] == other["start", view, None]
    rows = read_lines(Run(tmp_path / "again").answers / NAME / "start.jsonl")
    assert len(rows) == 2 * N
    assert again["lengths"] == plain["lengths"]
    assert any(f"includes {N} judged answers" in note for note in again["notes"][NAME]["start"])
    assert not any("extrapolates" in note for note in again["notes"][NAME]["start"])
    # the same as the arithmetic says of both sets of annotations
    data = read_data(world)
    first = read_annotations(Run(tmp_path / "again").answers / NAME / "start" / "annotations.json")
    second = asyncio.run(judged_again(data, rows[N:]))
    expected = score(first, data, 300, seed=3, again=second)
    assert expected.controlled is not None
    assert other["start", "length-controlled", None]["score"] == pytest.approx(expected.controlled.win_rate)
    assert expected.controlled.win_rate != pytest.approx(one["start", "length-controlled", None]["score"], abs=0.1)


async def judged_again(data: AlpacaData, rows: list[dict[str, Any]]) -> Sequence[Annotation]:
    outputs = Outputs("start", tuple(row["answer"] for row in rows))
    return (await judge(outputs, data, Judge(likes_long), AlpacaJudging())).annotations


def test_without_lengths_that_differ_there_is_no_controlled_rate_and_it_is_said(tmp_path: Path, world: Path) -> None:
    baseline = {row.text: row.baseline for row in read_data(world).instructions}
    answers = {"start": lambda text: baseline[text] + "!", "epoch-01": GIVEN.__getitem__}
    progress = Heard()
    summary = run_stage(tmp_path / "run", settings(world), answers, progress=progress)
    found = scores(tmp_path / "run")
    assert ("start", "length-controlled", None) not in found
    assert ("epoch-01", "length-controlled", None) in found
    assert {row["view"] for row in summary["improvement"]} == {"win-rate", "discrete"}
    assert any("no length-controlled score: every answer is 1 characters" in note for note in progress.notes)


def test_instructions_without_tables_have_the_plain_rates_alone(tmp_path: Path, world: Path) -> None:
    answers = {"start": GIVEN.__getitem__, "epoch-01": longer}
    run_stage(tmp_path / "whole", settings(world), answers)
    for table in world.glob("*.csv"):
        table.unlink()
    summary = run_stage(tmp_path / "plain", settings(world), answers)
    one, other = scores(tmp_path / "whole"), scores(tmp_path / "plain")
    rest = {key: row for key, row in one.items() if key[1] != "length-controlled"}
    assert {key: (row["score"], row["low"]) for key, row in rest.items()} == {
        key: (row["score"], row["low"]) for key, row in other.items()
    }
    assert [row["view"] for row in summary["improvement"] if row["category"] is None] == ["win-rate", "discrete"]
    assert any(note.startswith("no length-controlled rate") for note in summary["notes"][NAME]["start"])
    [row] = csv.DictReader((Run(tmp_path / "plain").answers / NAME / "start" / "leaderboard.csv").open())
    assert (row["length_controlled_winrate"], row["n_total"]) == ("", str(N))
    annotated = read_annotations(Run(tmp_path / "plain").answers / NAME / "start" / "annotations.json")
    assert gain(annotated, [annotated], read_data(world), 100, 0).lc is None
    with pytest.raises(EvaluationError, match="ask_again: is for the length-controlled rate"):
        AlpacaEval(settings(world, ask_again=True))


def test_an_answer_that_could_not_be_had_is_in_no_file_as_an_empty_one(tmp_path: Path, world: Path) -> None:
    lost, silent = list(GIVEN)[:2]

    def mostly(text: str) -> str:
        if text == lost:
            raise ReplyError("too long")
        return "" if text == silent else GIVEN[text]

    run_stage(tmp_path / "run", settings(world), {"start": mostly})
    found = read_outputs(Run(tmp_path / "run").answers / NAME / "start" / "model_outputs.json", read_data(world))
    by_text = dict(zip(GIVEN, found.answers, strict=True))
    assert (by_text[lost], by_text[silent], found.missing) == (None, "", 1)


def test_the_seed_of_the_evaluation_draws_the_verdicts(world: Path) -> None:
    benchmark, judge = AlpacaEval(settings(world)), Judge(likes_long)
    asyncio.run(benchmark.grade_all([Answered(item, "mine") for item in benchmark.items()], judge, lambda: None))
    assert {(request.seed, request.top_logprobs) for request in judge.requests} == {(3, 5)}


def test_the_files_are_asked_for_by_name(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"evaluate\.alpaca\.data: .*alpaca-eval's files.*https://"):
        AlpacaEval(EvaluateSettings.model_validate({"judge": {"model": "judge"}}))
    with pytest.raises(EvaluationError, match=r"evaluate\.judge: alpaca-eval is graded by a model"):
        AlpacaEval(EvaluateSettings.model_validate({"alpaca": {"data": str(tmp_path)}}))
    own = EvaluateSettings.model_validate({"alpaca": {"data": str(save_world(tmp_path)), "judge": {"model": "other"}}})
    judge = AlpacaEval(own).judge
    assert judge is not None
    assert judge.model == "other"


def test_a_stronger_model_is_measured_and_never_taken_for_a_checkpoint(tmp_path: Path, world: Path) -> None:
    # as long as the others' answers, and liked by a judge that likes what begins with c
    def likes_c(texts: list[str]) -> Reply:
        rates = {"c": 0.9, "d": 0.7, "a": 0.4, "b": 0.5}
        _, first, second = texts
        rate = rates[second[0]] / (rates[first[0]] + rates[second[0]])
        tokens = {"m": math.log(1 - rate), "M": math.log(rate)}
        return Reply("M", "length", "judge-1", logprobs=(tokens,))

    answers = {
        STRONGER: lambda text: "c" + GIVEN[text],
        "start": GIVEN.__getitem__,
        "epoch-01": lambda text: "d" + GIVEN[text],
    }
    summary = run_stage(tmp_path / "run", settings(world), answers, likes_c)
    assert summary["checkpoints"] == ["start", "epoch-01", "stronger"]
    assert [row["max_checkpoint"] for row in summary["improvement"]] == ["epoch-01"] * 3
    found = scores(tmp_path / "run")
    by_view = {row["view"]: row for row in summary["stronger"]}
    for view in ("win-rate", "length-controlled"):
        start, trained, strong = (found[name, view, None]["score"] for name in ("start", "epoch-01", STRONGER))
        row = by_view[view]
        assert row["gap"]["value"] == pytest.approx(strong - start)
        closed = row["closed"]["epoch-01"]
        assert closed["value"] == pytest.approx(100 * (trained - start) / (strong - start))
        assert closed["low"] - 1e-9 <= closed["value"] <= closed["high"] + 1e-9
    with np.load(Run(tmp_path / "run").resamples) as npz:
        meta = json.loads(bytes(npz["meta"]))
        assert meta["checkpoints"] == ["start", "epoch-01"]
        assert npz[f"{NAME}\twin-rate"].shape == (300, 2)
