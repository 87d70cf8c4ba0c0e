"""Each method from a recipe to pairs: the pocket policy, and its teacher behind a real endpoint on loopback."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path

import pytest
from commands import POCKET, ROOT
from scripted import Heard

from anchored import recipe as recipes
from anchored.datasets_io import read_pairs, read_rows
from anchored.errors import AnchoredError
from anchored.llm.replies import ReplyStore
from anchored.llm.shared import Books
from anchored.pipeline import Batching, Plan, _opened, execute
from anchored.pocket import world
from anchored.pocket.tasks import is_right, task_of
from anchored.pocket.teacher import Faults, Teacher
from anchored.progress import Silent
from anchored.records import Outcome
from anchored.runs import Run

SMALL = ("create.prompts.take=24", "create.prompts.held_out=2", "create.sample.batch_size=13")


def create(folder: Path, *more: str, heard: Silent | None = None) -> Run:
    return execute(Plan(recipes.load(POCKET, [*SMALL, *more]), folder, ("create",)), heard or Silent())


def at(teacher: Teacher, model: str = "pocket-teacher") -> str:
    return f"{{model: {model}, base_url: '{teacher.base_url}'}}"


@pytest.mark.parametrize("orders", ["one", "both"])
def test_judge_on_policy_pairs_right_answers_with_wrong_ones(tmp_path: Path, orders: str) -> None:
    with Teacher() as teacher:
        run = create(
            tmp_path,
            "create.method=judge-on-policy",
            f"create.judge={{model: pocket-teacher, base_url: '{teacher.base_url}', orders: {orders}}}",
        )
        parts = Counter(seen.part for seen in teacher.requests)
    pairs = read_pairs(run.pairs).pairs
    assert pairs
    assert parts["judge"] >= len(pairs) * (2 if orders == "both" else 1)
    for pair in pairs:
        task = task_of(pair.prompt.messages[-1].content)
        assert is_right(task, pair.chosen.text) >= is_right(task, pair.rejected.text)
    summary = run.summary("create")
    assert summary is not None
    assert set(summary["replies"]) == {"policy", "teacher"}
    assert set(summary["prompt_files"]) == {"teacher"}


def test_judge_off_policy_ranks_an_endpoint_against_a_file_and_never_loads_the_policy(tmp_path: Path) -> None:
    asked = world.prompts(take=24, held_out=2, seed=0)
    answers = tmp_path / "weak.jsonl"
    lines = [{"prompt": prompt.messages[-1].content, "completion": "I think it is 7."} for prompt in asked.prompts]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Teacher() as teacher:
        run = create(
            tmp_path / "run",
            "create.method=judge-off-policy",
            f"create.candidates=[{at(teacher)}]",
            f"create.answers.weak-model={answers}",
            f"create.judge={at(teacher)}",
        )
        parts = Counter(seen.part for seen in teacher.requests)
    pairs = read_pairs(run.pairs).pairs
    assert len(pairs) == 24
    assert {(pair.chosen.model, pair.rejected.model) for pair in pairs} == {("pocket-teacher", "weak-model")}
    assert all(is_right(task_of(pair.prompt.messages[-1].content), pair.chosen.text) for pair in pairs)
    assert parts == {"stronger": 24, "judge": 24}
    assert {str(row.outcome) for row in read_rows(run.refused)} == {"missing_answer"}, "the held-out prompts'"


def test_stronger_preferred_with_answers_of_the_policy_that_exist_already(tmp_path: Path) -> None:
    asked = world.prompts(take=24, held_out=2, seed=0)
    answers = tmp_path / "mine.jsonl"
    lines = [{"id": prompt.id, "response": "I think it is 7."} for prompt in (*asked.prompts, *asked.held_out)]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Teacher() as teacher:
        run = create(
            tmp_path / "run",
            "create.method=stronger-preferred",
            f"create.stronger={at(teacher)}",
            f"create.answers.policy={answers}",
        )
    assert len(read_pairs(run.pairs).pairs) == 24
    assert {pair.rejected.text for pair in read_pairs(run.pairs).pairs} == {"I think it is 7."}


def test_roles_at_one_endpoint_share_its_chat_and_so_its_limits(tmp_path: Path) -> None:
    same = "base_url: 'http://127.0.0.1:1/v1', model: pocket-teacher"
    recipe = recipes.load(
        POCKET,
        [
            "create.best_of={n: 2, by: judge}",
            f"create.reviser={{{same}, temperature: 0.9}}",
            f"create.judge={{{same}, temperature: 0.0, orders: both}}",
        ],
    )

    async def opened(recipe: recipes.Recipe) -> int:
        with ReplyStore(tmp_path / "replies.sqlite") as store:
            async with _opened(Run(tmp_path), recipe, Batching(), Books(store), Silent()) as them:
                return len({id(chat._chat) for role, chat in them.chats.items() if role != "policy"})

    assert asyncio.run(opened(recipe)) == 1
    other = recipe.create.judge.model_copy(update={"concurrency": 2})
    apart = recipe.model_copy(update={"create": recipe.create.model_copy(update={"judge": other})})
    assert asyncio.run(opened(apart)) == 2


def test_the_best_of_equal_revisions_needs_no_judge_and_is_told_to_be_paid_for_in_vain(tmp_path: Path) -> None:
    heard = Heard()
    with Teacher() as teacher:
        run = create(
            tmp_path,
            "create.best_of={n: 2, by: judge}",
            f"create.reviser={at(teacher)}",
            f"create.judge={at(teacher)}",
            "create.filters=[]",
            heard=heard,
        )
        parts = Counter(seen.part for seen in teacher.requests)
    summary = run.summary("create")
    assert summary is not None
    assert parts == {"reviser": summary["replies"]["teacher"]["asked"]}
    assert parts["reviser"] == 2 * summary["replies"]["policy"]["asked"]
    (told,) = [note for note in heard.notes if "seems to ignore temperature and seed" in note]
    assert told.startswith("pocket-teacher: two samples")


def test_a_policy_behind_an_endpoint_is_paid_for_as_a_teacher_is(tmp_path: Path) -> None:
    price = "price: {input: 2, output: 10}"
    with Teacher(Faults(leak=1.0)) as teacher:
        here = f"model: pocket-teacher, base_url: '{teacher.base_url}', {price}"
        settings = f"create.sample={{{here}, max_tokens: 500}}", f"create.reviser={{{here}}}", "create.filters=[]"
        run = create(tmp_path / "run", *settings)
        parts = Counter(seen.part for seen in teacher.requests)
        cost = sum(2e-6 * seen.prompt_tokens + 1e-5 * seen.completion_tokens for seen in teacher.requests)
        assert parts["stronger"] == parts["reviser"] == 26
        with pytest.raises(AnchoredError, match=r"create\.budget_usd is"):
            create(tmp_path / "capped", *settings, f"create.budget_usd={cost / 3}")
        capped = sum(2e-6 * seen.prompt_tokens + 1e-5 * seen.completion_tokens for seen in teacher.requests) - cost
    summary = run.summary("create")
    assert summary is not None
    assert summary["replies"]["policy"]["spent"]["run_usd"] == pytest.approx(cost)
    assert 0 < capped <= cost / 3


def test_a_team_of_revisers_makes_right_answers(tmp_path: Path) -> None:
    with Teacher() as teacher:
        step = f"model: pocket-teacher, base_url: '{teacher.base_url}'"
        run = create(
            tmp_path,
            f"create.team=[{{does: revise, {step}}}, {{does: critique, {step}}}, {{does: revise, {step}}}]",
            "create.filters=[]",
        )
        parts = Counter(seen.part for seen in teacher.requests)
    pairs = read_pairs(run.pairs).pairs
    assert len(pairs) >= 5
    assert all(is_right(task_of(pair.prompt.messages[-1].content), pair.chosen.text) for pair in pairs)
    assert all("step 2, critique (pocket-teacher): Nothing is to be mended." in pair.rational for pair in pairs)
    assert parts["reviser"] == 2 * parts["critic"]
    assert all(row.outcome is Outcome.IDENTICAL for row in read_rows(run.refused)), "those that were right before"


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ("create.answers.policy=nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("create.filters=[no_such_module:x]", "there is no module"),
        ("create.reviser.prompt=no-such-prompt", "is no file and no shipped prompt"),
    ],
)
def test_what_cannot_be_read_binds_no_run_folder(tmp_path: Path, wrong: str, error: str) -> None:
    with pytest.raises(AnchoredError, match=error):
        create(tmp_path, wrong)
    assert not Run(tmp_path).has_work()


def test_a_complete_run_says_that_its_prompt_file_changed(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text((ROOT / "anchored/create/prompts/reviser.txt").read_text("utf-8"))
    heard = Heard()
    with Teacher() as teacher:
        reviser = f"create.reviser={{model: pocket-teacher, base_url: '{teacher.base_url}', prompt: {mine}}}"
        plan = Plan(recipes.load(POCKET, [*SMALL, reviser]), tmp_path / "run", ("create",))
        execute(plan, Silent())
        execute(plan, heard)
        mine.write_text(mine.read_text() + "Be kind.\n")
        execute(plan, heard)
    assert heard.notes == [
        "create: complete",
        f"create: complete; {mine} changed since, --redo create makes the pairs anew",
    ]
