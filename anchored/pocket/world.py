"""The pocket world as the pipeline sees it: a model, prompts, a server and a benchmark like any other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anchored.datasets_io import PromptRows
from anchored.evaluate.benchmark import GradedByRule, Item, View
from anchored.pocket.tasks import Split, Task, grade, is_right, make_tasks
from anchored.pocket.teacher import Teacher
from anchored.records import Prompt, user_prompt

RECIPE = Path(__file__).with_name("pocket.yaml")
_POLICY = Path(__file__).with_name("policy")
_QUESTIONS = 300
_QUESTIONS_SEED = 20240812  # the benchmark's questions are the same for every run, as a benchmark's are


def policy_folder() -> Path:
    """The policy that comes with the package; `python -m anchored.pocket.build` makes it anew."""
    return _POLICY


def prompts(*, take: int | None, held_out: int | None, seed: int) -> PromptRows:
    """Different tasks for training, and others for the held-out pairs."""
    return PromptRows(
        prompts=_prompts(1000 if take is None else take, seed, "prompts"),
        held_out=_prompts(100 if held_out is None else held_out, seed, "held-out"),
    )


def teacher() -> Teacher:
    """The teacher behind a real endpoint on loopback."""
    return Teacher()


class PocketBenchmark(GradedByRule):
    """Tasks that neither pretraining nor the prompts hold, graded exactly."""

    name = "pocket"
    version = "1"
    views: tuple[View, ...] = (View("accuracy"), View("graded"))
    """accuracy: the result is right; graded: the share of right lines."""

    def __init__(self) -> None:
        tasks = make_tasks(_QUESTIONS, _QUESTIONS_SEED, "evaluation")
        self._tasks: dict[str, Task] = {task.id: task for task in tasks}
        self._items = tuple(Item(task.id, user_prompt(task.question), task.category) for task in tasks)

    def items(self) -> Sequence[Item]:
        return self._items

    def grade(self, item: Item, answer: str) -> dict[str, float]:
        task = self._tasks[item.id]
        return {"accuracy": float(is_right(task, answer)), "graded": grade(task, answer)}


def _prompts(count: int, seed: int, split: Split) -> list[Prompt]:
    return [user_prompt(task.question) for task in make_tasks(count, seed, split)]
