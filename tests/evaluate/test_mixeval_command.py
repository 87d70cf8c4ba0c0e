"""A run's evaluation with a real model and a judge endpoint: a stop in the middle, and the same again goes on."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from commands import anchored, anchored_killed
from fault_server import FaultServer, completion, fails, hangs
from small_mixeval import Heard, fair, rules, save

from anchored import recipe as recipes
from anchored.errors import BudgetReached, EvaluationError, ModelError, Stopped
from anchored.llm.money import Purse, Spending
from anchored.llm.replies import ReplyStore
from anchored.pipeline import Plan, execute
from anchored.pocket.world import policy_folder
from anchored.runs import Run, read_lines

NAME = "mixeval-hard/2024-06-01"


def trained(folder: Path) -> Run:
    """A run whose training is done, with one checkpoint."""
    run = Run(folder)
    run.checkpoints.mkdir(parents=True)
    shutil.copytree(policy_folder(), run.checkpoints / "epoch-01")
    run.complete("train", {"checkpoints": {"epoch-01": 3}})
    return run


def plan(folder: Path, clone: Path, base_url: str, **more: Any) -> Plan:
    judge = {"model": "judge", "base_url": base_url, "concurrency": 1, "retries": 0, "stop_after_failures": 1}
    mixeval = {"data": str(clone), "official_data": False}
    evaluation = {"benchmarks": [NAME], "judge": judge, "mixeval": mixeval, "sample": {"max_tokens": 8}}
    recipe = recipes.parse({"policy": {"model": "pocket"}, "evaluate": evaluation, **more}, "recipe")
    return Plan(recipe, folder, stages=("evaluate",))


def test_an_evaluation_stops_when_the_judge_is_down_and_goes_on(tmp_path: Path, server: FaultServer) -> None:
    run, clone = trained(tmp_path / "run"), save(tmp_path / "clone")
    fine, verdicts = rules(fair), []

    async def down_after_two(request: Any) -> Any:
        if request.method == "GET":
            return await fails(404)(request)
        if len(verdicts) == 2:
            return await fails(503)(request)
        verdicts.append((await request.json())["messages"][0]["content"])
        return await fine(request)

    server.always = down_after_two
    with pytest.raises(Stopped, match="is down"):
        execute(plan(run.folder, clone, server.base_url), Heard())
    asked: list[str] = []

    def judge(text: str) -> str:
        asked.append(text)
        return fair(text)

    server.always = rules(judge)
    execute(plan(run.folder, clone, server.base_url), Heard())
    assert len(asked) == 4
    assert not set(asked) & set(verdicts)
    lines = read_lines(run.scores)
    assert {line["checkpoint"] for line in lines} == {"start", "epoch-01"}
    assert {line["judge"].partition(",")[0] for line in lines} == {"judge"}
    assert (run.summary("evaluate") or {})["ungraded"] == 0
    assert json.loads((run.answers / NAME / "start.jsonl").read_text().splitlines()[0])["judgement"]


def test_what_the_judge_costs_is_counted_and_bounded_apart_from_the_data(tmp_path: Path, server: FaultServer) -> None:
    run, clone = trained(tmp_path / "run"), save(tmp_path / "clone")
    with ReplyStore(run.replies) as store:
        store.put([], [Spending("judge", 50.0, "usage")])  # what creating the pairs cost

    async def costs_a_dollar(request: Any) -> Any:
        verdict = fair((await request.json())["messages"][-1]["content"])
        usage = {"prompt_tokens": 1000, "completion_tokens": 0, "total_tokens": 1000}
        return web.json_response({**completion(verdict), "usage": usage})

    server.always = costs_a_dollar
    chosen = plan(run.folder, clone, server.base_url)
    assert chosen.recipe.evaluate.judge is not None
    priced = {**chosen.recipe.evaluate.judge.model_dump(), "price": {"input": 1000, "output": 1000}}

    def bounded(usd: float | None) -> Plan:
        evaluation = {**chosen.recipe.evaluate.model_dump(mode="json"), "judge": priced, "budget_usd": usd}
        recipe = recipes.parse({"policy": {"model": "pocket"}, "evaluate": evaluation}, "recipe")
        return Plan(recipe, run.folder, stages=("evaluate",))

    with pytest.raises(BudgetReached, match=r"evaluate\.budget_usd is 5\.00 USD.*raise evaluate\.budget_usd"):
        execute(bounded(5), Heard())
    before = len(server.seen)
    assert 0 < before < 5
    progress = Heard()
    execute(bounded(None), progress)
    assert len(server.seen) == 6
    spent = (run.summary("evaluate") or {})["spent"]
    assert (spent["run_usd"], spent["process_usd"]) == pytest.approx((6, 6 - before))
    assert spent["by_chat"] == pytest.approx({"judge": 6})
    assert "evaluate: 6.00 USD are spent on judges and the stronger model" in progress.notes
    with ReplyStore(run.replies) as store:
        assert Purse(None, store.spent()).spent_usd == 50


def test_a_judge_whose_key_is_wrong_is_found_before_the_model_answers(tmp_path: Path, server: FaultServer) -> None:
    run, clone = trained(tmp_path / "run"), save(tmp_path / "clone")
    server.always = fails(401)
    progress = Heard()
    with pytest.raises(ModelError, match="401"):
        execute(plan(run.folder, clone, server.base_url), progress)
    assert progress.steps == {}


def test_files_that_are_not_official_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    run, clone = trained(tmp_path / "run"), save(tmp_path / "clone")
    chosen = plan(run.folder, clone, "http://127.0.0.1:9/v1")
    official = chosen.recipe.evaluate.mixeval.model_copy(update={"official_data": True})
    evaluation = chosen.recipe.evaluate.model_copy(update={"mixeval": official})
    with pytest.raises(EvaluationError, match="has 5 rows, not the 500"):
        execute(Plan(chosen.recipe.model_copy(update={"evaluate": evaluation}), run.folder, ("evaluate",)), Heard())


def test_a_trial_takes_some_of_both_kinds(tmp_path: Path, server: FaultServer) -> None:
    run, clone = trained(tmp_path / "run"), save(tmp_path / "clone")
    server.always = rules(fair)
    execute(plan(run.folder, clone, server.base_url, limit=4), Heard())
    rows = read_lines(run.answers / NAME / "start.jsonl")
    assert [row["id"] for row in rows] == ["free-form/0", "free-form/1", "multiple-choice/0", "multiple-choice/1"]


def test_a_plan_says_who_will_not_answer_and_what_to_do(tmp_path: Path, server: FaultServer) -> None:
    clone, path = save(tmp_path / "clone"), tmp_path / "recipe.yaml"
    evaluation: dict[str, Any] = {
        "benchmarks": [NAME],
        "mixeval": {"data": str(clone), "official_data": False},
        "judge": {"model": "judge", "base_url": server.base_url, "key_env": "THE_JUDGES_KEY"},
        "stronger": {"model": "large", "base_url": server.base_url, "key_env": None},
    }
    creation = {"prompts": {"data": "pocket", "take": 8}, "reviser": {"model": "pocket-teacher", "serve": "pocket"}}
    path.write_text(yaml.safe_dump({"policy": {"model": "pocket"}, "create": creation, "evaluate": evaluation}))

    async def refuses_the_key(request: Any) -> Any:
        return await fails(401 if "secret" in request.headers.get("Authorization", "") else 404)(request)

    server.always = refuses_the_key
    done = anchored("plan", path, "--out", tmp_path / "run", env={"THE_JUDGES_KEY": "sk-secret"})
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.out.splitlines() if "│" in line]
    answers = {row[0]: row[3] for row in rows if len(row) == 4}
    assert answers == {"create: teacher": "not tried", "evaluate: judge": "no", "evaluate: stronger": "yes"}
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "evaluate: judge: " in done.err
    assert "THE_JUDGES_KEY" in done.err
    assert "sk-secret" not in done.err + done.out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_with_what_is_missing(tmp_path: Path, server: FaultServer) -> None:
    run, clone = trained(tmp_path / "run"), save(tmp_path / "clone")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(plan(run.folder, clone, server.base_url).recipe.model_dump(mode="json")))
    server.script, server.always = [rules(fair), rules(fair), rules(fair)], hangs()
    command = ("evaluate", path, "--out", run.folder)

    def three_are_kept() -> bool:
        if len(server.seen) < 4:
            return False
        with closing(sqlite3.connect(run.replies)) as store:
            return store.execute("select count(*) from replies").fetchone()[0] == 6 + 3

    assert anchored_killed(*command, when=three_are_kept) == -signal.SIGKILL
    assert run.summary("evaluate") is None
    server.always = rules(fair)
    done = anchored(*command)
    assert done.code == 0, done.err
    asked = [seen.body["messages"][0]["content"] for seen in server.seen]
    assert len(asked) == 6 + 1  # the one in flight is asked again
    assert len(set(asked)) == 6
    assert {line["n"] for line in read_lines(run.scores) if line["category"] is None} == {8}
