"""A benchmark of MixEval's form with made-up rows, a judge on loopback that plays by a function, and the stage."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from aiohttp import web
from fault_server import Act, completion

from anchored.evaluate.mixeval_files import Version
from anchored.evaluate.mixeval_hard import MixEvalHard
from anchored.evaluate.settings import EvaluateSettings
from anchored.evaluate.stage import Checkpoint, evaluate
from anchored.llm.chat import Reply, Request
from anchored.llm.openai_chat import OpenAIChat
from anchored.llm.replies import ReplyStore
from anchored.progress import Silent
from anchored.runs import Run

VERSION: Version = "2024-06-01"


def free(prompt: str, *target: str, benchmark: str = "TriviaQA", context: str | None = None) -> dict[str, Any]:
    return {
        "problem_type": "free-form",
        "context": context,
        "prompt": prompt,
        "target": [*target],
        "benchmark_name": benchmark,
    }


def choice(prompt: str, right: int, *options: str, benchmark: str = "MMLU") -> dict[str, Any]:
    return {
        "problem_type": "multiple-choice",
        "context": None,
        "prompt": prompt,
        "options": [*options],
        "target": [right],
        "benchmark_name": benchmark,
    }


FREE = [
    free("Capital of France?", "Paris", "Paris, France"),
    free("Capital of France?", "Paris", "Paris, France"),
    free("How many legs?", "4", benchmark="DROP", context="A cat."),
    free("6 x 7?", "42", benchmark="GSM8k"),
    free("Is it?", "yes", benchmark="AGIEval"),
]
CHOICES = [
    choice("Which is a colour?", 1, "seven", "blue", "loud"),
    choice("Which is a colour?", 1, "seven", "blue", "loud"),
    choice("Which swims?", 0, "(A)a fish", "(B)a stone", benchmark="AGIEval"),
]


def save(
    folder: Path,
    free_form: list[dict[str, Any]] = FREE,
    choices: list[dict[str, Any]] = CHOICES,
    version: str = VERSION,
) -> Path:
    """The files as a clone of the benchmark has them; returns the clone."""
    place = folder / "mix_eval" / "data" / f"mixeval-{version}" / "mixeval-hard"
    place.mkdir(parents=True)
    for split, rows in (("free-form", free_form), ("multiple-choice", choices)):
        (place / f"{split}.json").write_text(json.dumps({str(number): row for number, row in enumerate(rows)}))
    return folder


def settings(clone: Path, base_url: str = "http://127.0.0.1:9/v1", **more: Any) -> EvaluateSettings:
    """Of an evaluation on these rows; a key with a dot is one of a section."""
    mixeval: dict[str, Any] = {"data": str(clone), "official_data": False}
    judge: dict[str, Any] = {"model": "judge", "base_url": base_url, "most_failed": 1}
    sections: dict[str, dict[str, Any]] = {"mixeval": mixeval, "judge": judge}
    rest = {}
    for key, value in more.items():
        section, _, name = key.partition("__")
        if name:
            sections[section][name] = value
        else:
            rest[key] = value
    return EvaluateSettings.model_validate({"resamples": 200, **sections, **rest})


class Answers:
    """A checkpoint that answers by a function of the question's text."""

    def __init__(self, name: str, say: Callable[[str], str]) -> None:
        self.name = self.fingerprint = name
        self.asked: list[str] = []
        self._say = say

    async def reply(self, request: Request) -> Reply:
        text = request.messages[0].content
        self.asked.append(text)
        return Reply(self._say(text), "stop", self.name)

    async def close(self) -> None: ...


class Heard(Silent):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: dict[str, int] = {}

    def advance(self, task: str, by: int = 1, **facts: object) -> None:
        self.steps[task] = self.steps.get(task, 0) + by

    def note(self, text: str) -> None:
        self.notes.append(text)


def run_stage(
    folder: Path,
    chosen: EvaluateSettings,
    answers: Mapping[str, Callable[[str], str]],
    progress: Heard | None = None,
) -> dict[str, Any]:
    """The stage with a checkpoint for each function, the judge at its endpoint, and the store of replies."""
    assert chosen.judge is not None

    async def go() -> dict[str, Any]:
        with ReplyStore(folder / "replies.sqlite") as store:
            judge = store.remember(OpenAIChat(chosen.judge))  # type: ignore[arg-type]
            try:
                return await evaluate(
                    Run(folder),
                    chosen,
                    [MixEvalHard(VERSION, chosen)],
                    [Checkpoint(name, step, name) for step, name in enumerate(answers)],
                    lambda checkpoint: store.remember(Answers(checkpoint.name, answers[checkpoint.name])),
                    progress or Heard(),
                    {f"mixeval-hard/{VERSION}": judge},
                )
            finally:
                await judge.close()

    return asyncio.run(go())


def rules(rule: Callable[[str], str], finish_reason: str = "stop") -> Act:
    """A judge whose reply is a function of its last message."""

    async def act(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        return web.json_response(completion(rule(body["messages"][-1]["content"]), finish_reason=finish_reason))

    return act


def answer_in(question: str) -> str:
    """The answer that the judge is shown."""
    found = re.search(r"={20}\n(.*)\n={20}", question, re.DOTALL)
    return found[1] if found else ""


def fair(question: str) -> str:
    """Grades as a judge should, seeing only what it is shown."""
    answer = answer_in(question)
    if "Accepted answers" in question:
        accepted = re.findall(r"^- (.*)$", question, re.MULTILINE)
        return f"It compares.\n[[{1.0 if any(one in answer for one in accepted) else 0.0}]]"
    options = re.findall(r"^([A-Z])\. (.*)$", question.split("====")[0], re.MULTILINE)
    named = next((name for name, option in options if option in answer or answer.startswith(name)), "NONE")
    return f"It settles.\n[[{named}]]"


def good(question: str) -> str:
    """Answers every question rightly."""
    known = {"France": "It is Paris.", "legs": "4", "6 x 7": "So 42.", "Is it": "yes", "colour": "B", "swims": "A."}
    return next(answer for words, answer in known.items() if words in question)


def bad(question: str) -> str:
    return "C" if "Options" in question or "option letter" in question else "No idea."
