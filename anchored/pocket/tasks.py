"""The pocket world's tasks: made, read back from their text, and graded.

A task is a question whose answer is a few written steps and a result. Everything follows from the question's text, so
the grader and the teacher need nothing else. Nothing here knows a model; the wording of answers is in `phrasing`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal

from rapidfuzz.distance import LCSseq

from anchored.errors import DataError
from anchored.pocket.phrasing import Step, read_line, result_step
from anchored.pocket.problems import PROBLEMS, Facts, Mind, Solution
from anchored.records import content_hash, user_prompt

Split = Literal["pretraining", "prompts", "held-out", "evaluation"]
CATEGORIES = tuple(PROBLEMS)


@dataclass(frozen=True, slots=True)
class Task:
    """One question and its only right solution."""

    id: str
    category: str
    question: str
    steps: tuple[Step, ...]
    """What the lines of a right answer say, the result's line apart."""
    result: str
    split: Split
    """By what is asked, not how: another wording of the same problem is in the same split."""


def make_tasks(count: int, seed: int, split: Split = "prompts") -> list[Task]:
    """`count` different tasks of a split, every category as often as the others."""
    rng = _rng(seed, split)
    tasks: dict[str, Task] = {}
    for category in itertools.islice(itertools.cycle(CATEGORIES), count):
        drawn = (_draw(category, rng, split) for _ in range(_DRAWS))
        task = next((task for task in drawn if task.question not in tasks), None)
        if task is None:
            raise DataError(f"there are no {count} different {split} tasks; ask for {len(tasks)} at most")
        tasks[task.question] = task
    return list(tasks.values())


def task_stream(seed: int, split: Split) -> Iterator[Task]:
    """Tasks of a split without end, the categories in turn; questions may come again."""
    rng = _rng(seed, split)
    for category in itertools.cycle(CATEGORIES):
        yield _draw(category, rng, split)


def task_of(question: str) -> Task:
    """The task that a question's text asks. Raises DataError where it is none of the pocket world's."""
    asked = _read_question(question)
    if asked is None:
        raise DataError(f"{question[:80]!r} is no pocket task; make_tasks gives the questions that are")
    return _task(asked.category, question, asked.facts)


def solve(task: Task, mind: Mind) -> Solution:
    """The solution that this mind comes to."""
    asked = _read_question(task.question)
    assert asked is not None, "a Task's question is one"
    return PROBLEMS[asked.category].solve(asked.facts, mind)


def grade(task: Task, answer: str) -> float:
    """0..1: the share of right lines, in order, the result's among them; 1 only where nothing is wrong or too much.

    An opening may stand before the first step; every other line that is not a right step counts as a wrong one.
    """
    expected = [*task.steps, result_step(task.result)]
    said = _said(answer)
    return LCSseq.similarity(expected, said) / max(len(expected), len(said))


def is_right(task: Task, answer: str) -> bool:
    """Whether the result that the answer states last is the right one."""
    results = [step for step in _said(answer) if step is not None and step.kind == "result"]
    return bool(results) and results[-1] == result_step(task.result)


# How many draws without a new question mean that there is none left.
_DRAWS = 1000


def _rng(seed: int, split: Split) -> Random:
    return Random(f"{split}/{seed}")


def _draw(category: str, rng: Random, split: Split) -> Task:
    problem = PROBLEMS[category]
    while _split_of(category, facts := problem.draw(rng)) != split:
        pass
    return _task(category, rng.choice(problem.wordings).fill(facts), facts)


@dataclass(frozen=True, slots=True)
class _Asked:
    category: str
    facts: Facts


def _read_question(question: str) -> _Asked | None:
    for category, problem in PROBLEMS.items():
        for wording in problem.wordings:
            facts = wording.read(question)
            if facts is not None:
                return _Asked(category, facts)
    return None


def _task(category: str, question: str, facts: Facts) -> Task:
    right = PROBLEMS[category].solve(facts, Mind())
    split = _split_of(category, facts)
    return Task(user_prompt(question).id, category, question, right.steps, right.result, split)


def _split_of(category: str, facts: Facts) -> Split:
    asked = {slot: value for slot, value in facts.items() if slot != "item"}
    bucket = int(content_hash([category, asked])[:8], 16) % 100
    if bucket < 15:
        return "evaluation"
    if bucket < 20:
        return "held-out"
    return "prompts" if bucket < 40 else "pretraining"


def _said(answer: str) -> list[Step | None]:
    """What each line says, None where that is unreadable; empty lines and an opening are left out."""
    lines = [read_line(line) for line in answer.splitlines() if line.strip()]
    said = [line.step if line else None for line in lines]
    return said[1:] if said and said[0] is None else said
