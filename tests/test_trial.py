"""`--limit N` and then without, and the other way round: nothing is paid twice, nothing of worth is lost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from anchored import recipe as recipes
from anchored.datasets_io import read_pairs
from anchored.errors import RecipeError
from anchored.pipeline import Plan, execute
from anchored.pocket import world
from anchored.pocket.teacher import Teacher
from anchored.progress import Silent
from anchored.runs import Run, read_lines

ROWS = 8


class Heard(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """Pairs of answers that are there and a teacher's; no model is loaded for them."""
    asked = world.prompts(take=ROWS, held_out=0, seed=0).prompts
    answers = tmp_path / "mine.jsonl"
    lines = [{"id": prompt.id, "response": "I think it is 7."} for prompt in asked]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "method": "stronger-preferred",
        "prompts": {"data": "pocket", "take": ROWS, "held_out": 0},
        "answers": {"policy": str(answers)},
    }


def plan(
    folder: Path,
    settings: dict[str, Any],
    base_url: str = "http://127.0.0.1:9/v1",
    limit: int | None = None,
    stages: Sequence[str] = ("create",),
    redo: str | None = None,
    **more: Any,
) -> Plan:
    stronger = {"model": "pocket-teacher", "base_url": base_url}
    sections = {"policy": {"model": "pocket"}, "create": {**settings, "stronger": stronger}, "limit": limit, **more}
    return Plan(recipes.parse(sections, "recipe"), folder, stages, redo)


def limit_in(run: Run) -> int | None:
    return (run.read_recipe() or {})["limit"]


def test_what_follows_a_trial_asks_the_rest_alone(tmp_path: Path, settings: dict[str, Any]) -> None:
    heard = Heard()
    with Teacher() as teacher:
        for limit, asked, pairs in ((3, 3, 3), (5, 5, 5), (None, ROWS, ROWS), (None, ROWS, ROWS)):
            run = execute(plan(tmp_path / "run", settings, teacher.base_url, limit), heard)
            assert (len(teacher.requests), len(read_pairs(run.pairs).pairs)) == (asked, pairs)
            assert limit_in(run) == limit
    told = [note for note in heard.notes if note.startswith("limit")]
    assert told == [
        "limit: 3 prompts before, 5 prompts now; create and what follows begin anew, and only what has no stored reply "
        "is asked",
        "limit: 5 prompts before, all prompts now; create and what follows begin anew, and only what has no stored "
        "reply is asked",
    ]


@pytest.mark.parametrize("redo", [None, "create"])
def test_a_trial_replaces_no_pairs_and_is_free_in_a_folder_of_its_own(
    tmp_path: Path, settings: dict[str, Any], redo: str | None
) -> None:
    from anchored.llm.replies import ReplyStore

    with Teacher() as teacher:
        run = execute(plan(tmp_path / "run", settings, teacher.base_url), Silent())
        before = run.pairs.read_bytes()
        with pytest.raises(RecipeError, match=r"limit is 3, .* on all prompts, .* --out .*run-trial \(after `anchored"):
            execute(plan(tmp_path / "run", settings, teacher.base_url, 3, redo=redo), Silent())
        assert (run.pairs.read_bytes(), limit_in(run)) == (before, None)
        trial = Run(tmp_path / "run-trial")
        trial.folder.mkdir()
        with ReplyStore(trial.replies) as store:
            store.merge(run.replies)
        execute(plan(trial.folder, settings, teacher.base_url, 3), Silent())
        assert (len(read_pairs(trial.pairs).pairs), len(teacher.requests)) == (3, ROWS)


def test_a_run_that_has_replies_alone_may_become_a_trial(tmp_path: Path, settings: dict[str, Any]) -> None:
    with Teacher() as teacher:
        run = execute(plan(tmp_path, settings, teacher.base_url), Silent())
        run.redo("create")  # as where it was interrupted
        execute(plan(tmp_path, settings, teacher.base_url, 3), Silent())
        assert len(teacher.requests) == ROWS
    assert len(read_pairs(run.pairs).pairs) == 3


@pytest.mark.parametrize(
    ("seconds", "says"), [(30.0, ""), (7200.0, "trained for 120 minutes on that"), (None, "began to train on that")]
)
def test_long_training_on_a_trial_is_not_replaced_unasked(
    tmp_path: Path, settings: dict[str, Any], seconds: float | None, says: str
) -> None:
    with Teacher() as teacher:
        run = execute(plan(tmp_path, settings, teacher.base_url, 3), Silent())
        weights = run.checkpoints / "epoch-01"
        weights.mkdir(parents=True)
        if seconds is not None:
            run.complete("train", {"seconds": seconds, "checkpoints": {"epoch-01": 1}})
        if says:
            with pytest.raises(RecipeError, match=rf"limit is none, .* begun with 3 and {says}; --redo create"):
                execute(plan(tmp_path, settings, teacher.base_url), Silent())
            assert weights.exists()
            execute(plan(tmp_path, settings, teacher.base_url, redo="create"), Silent())
        else:
            execute(plan(tmp_path, settings, teacher.base_url), Silent())
        assert len(teacher.requests) == ROWS
    assert not weights.exists()
    assert run.summary("train") is None


def test_training_alone_does_not_take_a_trials_pairs_for_all(tmp_path: Path, settings: dict[str, Any]) -> None:
    with Teacher() as teacher:
        execute(plan(tmp_path, settings, teacher.base_url, 3), Silent())
    with pytest.raises(RecipeError, match=r"begun with 3: make the other pairs first, by `anchored create`.*--limit 3"):
        execute(plan(tmp_path, settings, stages=("train",)), Silent())


def test_another_setting_that_changed_too_is_named_before_anything_is_dropped(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    with Teacher() as teacher:
        run = execute(plan(tmp_path, settings, teacher.base_url, 3), Silent())
        with pytest.raises(RecipeError, match=r"--redo create"):
            execute(plan(tmp_path, {**settings, "filters": []}, teacher.base_url, train={"epochs": 3}), Silent())
    assert len(read_pairs(run.pairs).pairs) == 3


def test_an_evaluation_may_be_of_fewer_questions_than_the_run(tmp_path: Path, settings: dict[str, Any]) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"prompt": f"Add {n} and 1.", "answer": n + 1}) + "\n" for n in range(6)))
    folder = tmp_path / "run"
    more = {"evaluate": {"benchmarks": [str(questions)], "sample": {"max_tokens": 2}, "resamples": 100}}
    with Teacher() as teacher:
        run = execute(plan(folder, settings, teacher.base_url, **more), Silent())
    run.complete("train", {"seconds": 7200.0, "checkpoints": {}})
    heard = Heard()
    for limit, asked in ((2, 2), (None, 6), (3, 6)):
        execute(plan(folder, settings, limit=limit, stages=("evaluate",), **more), heard)
        assert len(read_lines(run.answers / "questions" / "start.jsonl")) == asked
        assert (limit_in(run), len(read_pairs(run.pairs).pairs)) == (None, ROWS)
    told = [note for note in heard.notes if note.startswith("evaluate: ") and "question" in note]
    assert told == [
        "evaluate: of 2 questions of each benchmark before, of all questions now; what is answered is not asked again",
        "evaluate: is there, of all questions",
    ]
    # the whole command takes it as it is
    execute(plan(folder, settings, stages=("create", "train", "evaluate"), **more), heard)
