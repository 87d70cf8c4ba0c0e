"""AlpacaEval in a run, with a real model, and a judge and a stronger model behind one real endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alpaca_world import N, save_world
from fault_server import FaultServer
from small_mixeval import Heard, fair, rules, save
from test_alpaca_judge import QUOTED
from test_mixeval_command import trained

from anchored import pipeline
from anchored import recipe as recipes
from anchored.llm.settings import EndpointSettings
from anchored.pipeline import Plan, execute
from anchored.runs import read_lines


def likes_digits(asked: str) -> str:
    """As the stronger model it answers in digits; as the judge it prefers them, and otherwise what is longer."""
    if not (texts := QUOTED.findall(asked)):
        return "1234567890 is the answer"
    _, first, second = texts
    if first.isascii() and first[:1].isdigit() != second[:1].isdigit():
        return "m" if first[:1].isdigit() else "M"
    return "m" if len(first) > len(second) else "M"


def test_a_run_is_judged_against_the_baseline_and_measured_against_a_stronger_model(
    tmp_path: Path, server: FaultServer
) -> None:
    run, world = trained(tmp_path / "run"), save_world(tmp_path / "data")
    server.always = rules(likes_digits)
    there = {"base_url": server.base_url, "key_env": None}
    evaluation: dict[str, Any] = {
        "benchmarks": ["alpaca-eval"],
        "alpaca": {"data": str(world), "judge": {"model": "judge", **there}},
        "stronger": {"model": "large", "max_tokens": 77, **there},
        "sample": {"max_tokens": 4},
        "resamples": 200,
    }
    recipe = recipes.parse({"policy": {"model": "pocket"}, "evaluate": evaluation}, "recipe")
    progress = Heard()
    execute(Plan(recipe, run.folder, stages=("evaluate", "report")), progress)
    found = {(row["checkpoint"], row["view"]): row for row in read_lines(run.scores) if row["category"] is None}
    assert {name for name, _ in found} == {"start", "epoch-01", "stronger"}
    assert found["stronger", "win-rate"]["score"] == 100
    assert found["start", "win-rate"] | {"checkpoint": "epoch-01", "step": 3} == found["epoch-01", "win-rate"]
    assert found["start", "win-rate"]["judge"].startswith("judge, prompt ")
    assert found["start", "win-rate"]["judge"].endswith("read by text")
    summary = run.summary("evaluate") or {}
    assert {row["closed"]["epoch-01"]["value"] for row in summary["stronger"]} == {0.0}
    # who answers, and who judges three sets of answers, is asked once for each
    asked = [request.body["messages"][-1]["content"] for request in server.seen]
    assert sum("leaderboard" not in text for text in asked) == N
    limits = {request.body["max_tokens"] for request in server.seen if request.body["model"] == "large"}
    assert limits == {77}, "the stronger model answers by its own settings"
    assert sum("leaderboard" in text for text in asked) < 3 * N
    assert "alpaca-eval" in run.report.read_text("utf-8")


def test_judges_at_one_endpoint_share_its_limits(tmp_path: Path, server: FaultServer, monkeypatch: Any) -> None:
    opened: list[str] = []
    open_them = pipeline.open_endpoints

    def noted(one: EndpointSettings, **how: Any) -> Any:
        opened.append(one.model)
        return open_them(one, **how)

    monkeypatch.setattr(pipeline, "open_endpoints", noted)
    run, judge = trained(tmp_path / "run"), {"model": "judge", "base_url": server.base_url, "key_env": None}
    server.always = rules(lambda asked: likes_digits(asked) if QUOTED.search(asked) else fair(asked))
    evaluation: dict[str, Any] = {
        "benchmarks": ["mixeval-hard/2024-06-01", "alpaca-eval"],
        "judge": judge,
        "mixeval": {"data": str(save(tmp_path / "clone")), "official_data": False},
        "alpaca": {"data": str(save_world(tmp_path / "data")), "judge": {**judge, "tries": 2, "temperature": 1.0}},
        "sample": {"max_tokens": 4},
        "resamples": 200,
    }
    recipe = recipes.parse({"policy": {"model": "pocket"}, "evaluate": evaluation}, "recipe")
    execute(Plan(recipe, run.folder, stages=("evaluate",)), Heard())
    assert opened == ["judge"]
