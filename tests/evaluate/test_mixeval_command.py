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
from commands import anchored, anchored_killed
from fault_server import FaultServer, fails, hangs
from small_mixeval import Heard, fair, rules, save

from anchored import recipe as recipes
from anchored.errors import EvaluationError, ModelError, Stopped
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
