"""Published AlpacaEval 2.0 numbers, from the judge's recorded log-probabilities and preferences to the last digit."""

from __future__ import annotations

import asyncio
import csv
import gzip
import json
import math
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anchored.evaluate import statistics
from anchored.evaluate.alpaca_eval import AlpacaEval
from anchored.evaluate.alpaca_files import BASELINE, DIFFICULTY, AlpacaData, Annotation, read_data, read_outputs
from anchored.evaluate.alpaca_judge import Frame
from anchored.evaluate.alpaca_score import leaderboard_row, overlap_of, score
from anchored.evaluate.length_control import GamedRows, JudgedRows, Weights, length_controlled, predicted, refit
from anchored.evaluate.preference import FIRST, SECOND, TIE, for_the_second, from_logprobs, is_switched, win_rate
from anchored.evaluate.settings import EvaluateSettings
from anchored.evaluate.stage import Checkpoint, evaluate
from anchored.llm.chat import Reply, Request
from anchored.progress import Silent
from anchored.records import user_prompt
from anchored.runs import Run, read_lines

DATA = Path(os.environ.get("ANCHORED_REAL_DATA") or Path(__file__).parents[3] / "shared" / "data") / "alpaca_eval"

pytestmark = pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is missing (or set ANCHORED_REAL_DATA)")

STALE = {"dbrx-instruct", "NullModel"}
"""Their published weights do not belong to their published rates."""


@cache
def table(name: str) -> list[dict[str, str]]:
    file = DATA / name
    text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return list(csv.DictReader(text.decode().splitlines()))


@cache
def lines(name: str) -> list[Any]:
    return [json.loads(line) for line in gzip.decompress((DATA / name).read_bytes()).splitlines()]


def column(rows: list[dict[str, str]], name: str) -> np.ndarray:
    return np.array([float(row[name]) for row in rows])


def difficulty() -> np.ndarray:
    return column(table("instruction_difficulty_recovered.csv.gz"), "instruction_difficulty")


def surrogate() -> GamedRows:
    rows = table("df_gamed_surrogate.csv.gz")
    return GamedRows(*(column(rows, name) for name in ("preference", "std_delta_len", "instruction_difficulty")))


def judged(model: str) -> JudgedRows:
    rows = [row for row in table("annotations.csv.gz") if row["model"] == model]
    assert [int(row["index"]) for row in rows] == list(range(805))
    return JudgedRows(column(rows, "preference"), column(rows, "len_1") - column(rows, "len_2"), difficulty())


def expected() -> list[dict[str, str]]:
    return table("expected_lc.csv")


def test_recorded_log_probabilities_give_the_recorded_preferences_and_the_published_rates() -> None:
    instructions = {row["index"]: row["instruction"] for row in lines("instructions.jsonl.gz")}
    ours, recorded = [], []
    for row in lines("judge_logprobs.jsonl.gz"):
        if row["top_logprobs"] is None:  # two identical answers: nobody was asked
            preference = TIE
        else:
            shown_second = from_logprobs(dict(row["top_logprobs"]))
            assert shown_second is not None
            preference = for_the_second(shown_second, is_switched(instructions[row["index"]]))
        ours.append(preference)
        recorded.append(row["preference"])
    assert len(ours) == 805
    assert np.array(ours) == pytest.approx(np.array(recorded), abs=1e-9)
    [published] = [row for row in expected() if row["model"] == "claude-2"]
    assert win_rate(np.array(ours)).win_rate == pytest.approx(float(published["win_rate"]), abs=1e-9)


def test_win_rate_error_and_discrete_win_rate_are_the_published_ones() -> None:
    for row in expected():
        rates = win_rate(judged(row["model"]).preference)
        for name in ("win_rate", "standard_error", "discrete_win_rate"):
            # the file has preferences to 9 decimals, so a rate (of 1, not 100) is known to as many
            assert getattr(rates, name) / 100 == pytest.approx(float(row[name]) / 100, abs=1e-9), (row["model"], name)


def test_lengths_are_the_published_ones() -> None:
    for row in expected():
        lengths = [float(one["len_2"]) for one in table("annotations.csv.gz") if one["model"] == row["model"]]
        assert int(np.mean(lengths)) == int(row["avg_length"]), row["model"]


def test_published_weights_give_the_published_length_controlled_rates() -> None:
    published = {row[""]: row for row in table("weighted_leaderboard.csv.gz")}
    checked = errors_checked = 0
    for row in table("length_controlled_v1_weights.csv.gz"):
        model = row[""]
        if model in STALE or model not in published or published[model]["n_total"] != "805":
            continue
        weights = Weights(
            float(row["np.tanh(std_delta_len)"]),
            float(row["instruction_difficulty"]),
            float(row["not_gamed_baseline.astype(float)"]),
        )
        rates = 100 * predicted(weights, difficulty())
        assert rates.mean() == pytest.approx(float(published[model]["length_controlled_winrate"]), abs=1e-6), model
        checked += 1
        if error := published[model]["lc_standard_error"]:
            assert rates.std(ddof=1) / 805**0.5 == pytest.approx(float(error), abs=1e-9), model
            errors_checked += 1
    assert (checked, errors_checked) == (186, 35)


def test_refits_meet_the_published_length_controlled_rates() -> None:
    for row in expected():
        rows, published = judged(row["model"]), float(row["lc_published"])
        assert length_controlled(rows, surrogate()).win_rate == pytest.approx(published, abs=0.16), row["model"]
        with_c = length_controlled(rows, surrogate(), float(row["grid_C"])).win_rate
        assert with_c == pytest.approx(published, abs=0.02), row["model"]


def test_refits_meet_what_the_official_package_and_an_exact_solver_give() -> None:
    for row in expected():
        rows = judged(row["model"])
        with_c = length_controlled(rows, surrogate(), float(row["grid_C"])).win_rate
        assert with_c == pytest.approx(float(row["lc_with_grid_C"]), abs=1e-5), row["model"]


def test_refits_to_resamples_spread_about_twice_as_far_as_the_official_error_says() -> None:
    rows = judged("claude-2")
    fit = length_controlled(rows, surrogate())
    spread = refit(rows, surrogate(), fit.c, statistics.draws(len(rows.gap), 400, 0))
    assert spread.mean() == pytest.approx(fit.win_rate, abs=0.3)
    assert 1.6 * fit.standard_error < spread.std() < 2.4 * fit.standard_error


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The benchmark as its users have it, but for the regression data and the difficulties, which stand in."""
    folder = tmp_path_factory.mktemp("alpaca_eval")
    (folder / BASELINE).write_text(json.dumps(outputs("gpt4_1106_preview")), "utf-8")
    (folder / f"{DIFFICULTY}.gz").write_bytes((DATA / "instruction_difficulty_recovered.csv.gz").read_bytes())
    name = "df_gamed_surrogate.csv.gz"
    (folder / name).write_bytes((DATA / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def data(folder: Path) -> AlpacaData:
    return read_data(folder)


def outputs(model: str) -> list[dict[str, str]]:
    """A model's outputs file."""
    return [
        {"dataset": row["dataset"], "instruction": row["instruction"], "output": output, "generator": model}
        for row, output in zip(lines("instructions.jsonl.gz"), lines(f"outputs_{model}.jsonl.gz"), strict=True)
    ]


def annotated(model: str, data: AlpacaData, file: Path) -> list[Annotation]:
    """A model's outputs, read from a file, with the recorded preferences."""
    file.write_text(json.dumps(outputs(model)), "utf-8")
    preferences = [float(row["preference"]) for row in table("annotations.csv.gz") if row["model"] == model]
    answers = read_outputs(file, data)
    assert answers.missing == 0
    return [
        Annotation(one.text, one.baseline, str(answer), preference, data.baseline, answers.generator)
        for one, answer, preference in zip(data.instructions, answers.answers, preferences, strict=True)
    ]


def test_the_official_instructions_and_the_baseline_are_known(data: AlpacaData) -> None:
    assert (data.baseline, len(data.instructions)) == ("gpt4_1106_preview", 805)
    assert data.regression.startswith("df_gamed_surrogate.csv.gz (sha256 ")
    assert [note.split()[0] for note in data.notes] == ["length", "instruction_difficulty.csv.gz"]


@pytest.mark.parametrize("model", ["claude-2", "OpenHermes-2.5-Mistral-7B"])
def test_outputs_and_preferences_give_the_leaderboards_row(model: str, data: AlpacaData, tmp_path: Path) -> None:
    [published] = [row for row in table("weighted_leaderboard.csv.gz") if row[""] == model]
    result = score(annotated(model, data, tmp_path / "outputs.json"), data, 200, 0)
    row = leaderboard_row(result)
    for name in ("n_wins", "n_wins_base", "n_draws", "n_total", "avg_length"):
        assert row[name] == int(published[name]), name
    for name, tolerance in (("win_rate", 1e-7), ("standard_error", 1e-7), ("discrete_win_rate", 1e-9)):
        assert row[name] == pytest.approx(float(published[name]), abs=tolerance), name
    assert row["length_controlled_winrate"] == pytest.approx(float(published["length_controlled_winrate"]), abs=0.16)
    assert result.lc is not None
    assert result.lc.low < result.lc.value < result.lc.high


def test_the_baseline_against_itself_is_one_half(data: AlpacaData, tmp_path: Path) -> None:
    result = score(annotated("gpt4_1106_preview", data, tmp_path / "outputs.json"), data, 200, 0)
    assert (result.rates.win_rate, result.rates.draws) == (50, 805)
    assert result.controlled is not None
    assert result.controlled.win_rate == 50


def test_models_whose_answers_are_all_but_never_as_long_as_the_baselines_are_warned_of() -> None:
    warned = {row["model"] for row in expected() if overlap_of(judged(row["model"]).gap).extrapolates}
    assert warned == {"alpaca-7b", "gpt-3.5-turbo-1106", "gpt-3.5-turbo-1106_concise", "gpt4_0613_concise"}


class Recorded:
    """A chat that says what was recorded."""

    def __init__(self, name: str, replies: Mapping[Any, Reply]) -> None:
        self.name = self.fingerprint = name
        self._replies = replies

    async def reply(self, request: Request) -> Reply:
        return self._replies[request.messages]

    async def close(self) -> None: ...


def test_recorded_answers_and_verdicts_go_through_the_stage_to_the_published_rates(
    folder: Path, data: AlpacaData, tmp_path: Path
) -> None:
    names = ("claude-2", "vicuna-7b")
    answers = {name: [row["output"] for row in outputs(name)] for name in names}
    settings = EvaluateSettings.model_validate(
        {"judge": {"model": "judge"}, "alpaca": {"data": str(folder)}, "resamples": 100}
    )
    frame, verdicts = Frame(settings.alpaca), {}
    told = [row["top_logprobs"] for row in lines("judge_logprobs.jsonl.gz")]
    graded = {row["model"]: row for row in expected()}
    for name in names:
        preferences = [float(row["preference"]) for row in table("annotations.csv.gz") if row["model"] == name]
        for place, (one, answer) in enumerate(zip(data.instructions, answers[name], strict=True)):
            # claude-2's are the judge's own log-probabilities; of the other only the preference is recorded
            tokens = dict(told[place] or ()) if name == "claude-2" else for_preference(preferences[place], one.text)
            verdicts[frame.request(one, answer).messages] = Reply("?", "length", "judge", logprobs=(tokens,))
    chats = {
        name: Recorded(
            name,
            {
                user_prompt(one.text).messages: Reply(answer, "stop", name)
                for one, answer in zip(data.instructions, answers[name], strict=True)
            },
        )
        for name in names
    }
    run = Run(tmp_path)
    checkpoints = [Checkpoint(name, step, name) for step, name in enumerate(names)]
    benchmark = AlpacaEval(settings)
    asyncio.run(
        evaluate(
            run,
            settings,
            [benchmark],
            checkpoints,
            lambda checkpoint: chats[checkpoint.name],
            Silent(),
            {benchmark.name: Recorded("judge", verdicts)},
        )
    )
    for row in read_lines(run.scores):
        published = graded[row["checkpoint"]]
        if row["category"] is None:
            assert row["n"] == 805
            name, tolerance = {
                "win-rate": ("win_rate", 1e-7),
                "discrete": ("discrete_win_rate", 1e-9),
                "length-controlled": ("lc_published", 0.16),
            }[row["view"]]
            assert row["score"] == pytest.approx(float(published[name]), abs=tolerance), row
            assert row["low"] < row["score"] < row["high"]
    for name in names:
        lengths = [len(row["answer"]) for row in read_lines(run.answers / benchmark.name / f"{name}.jsonl")]
        assert int(np.mean(lengths)) == int(graded[name]["avg_length"])


def for_preference(preference: float, instruction: str) -> dict[str, float]:
    """Log-probabilities that give this preference."""
    shown_second = for_the_second(preference, is_switched(instruction)) - 1
    # a judge that is sure names the other one nowhere
    return {name: math.log(rate) for name, rate in ((FIRST, 1 - shown_second), (SECOND, shown_second)) if rate > 0}
