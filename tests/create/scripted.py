"""Chats that say what a function says, and the create stage run with them behind the real store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from anchored.create.settings import CreateSettings
from anchored.create.stage import CreateSummary, create
from anchored.datasets_io import PromptRows
from anchored.llm.chat import Chat, Reply, Request, Usage
from anchored.llm.replies import ReplyStore
from anchored.progress import Silent
from anchored.records import Pair, user_prompt
from anchored.runs import Run

REASONED = "{teacher_reasoning}: It lacks a reason.\n\n{corrected_student_solution}:\n"


class Scripted:
    """A chat that says what its function says."""

    def __init__(self, name: str, say: Callable[[Request], str | Reply]) -> None:
        self.name = self.fingerprint = name
        self.requests: list[Request] = []
        self._say = say

    async def reply(self, request: Request) -> Reply:
        await asyncio.sleep(0)
        said = self._say(request)
        self.requests.append(request)
        return said if isinstance(said, Reply) else Reply(said, "stop", f"{self.name}-1", usage=Usage(10, 5))

    async def close(self) -> None: ...


class Heard(Silent):
    """Keeps what a stage tells."""

    def __init__(self) -> None:
        self.steps = 0
        self.facts: dict[str, object] = {}
        self.notes: list[str] = []

    def advance(self, task: str, by: int = 1, **facts: object) -> None:
        self.steps += by
        self.facts = facts

    def note(self, text: str) -> None:
        self.notes.append(text)


def settings(**more: object) -> CreateSettings:
    return CreateSettings.model_validate({"reviser": {"model": "teacher"}, **more})


def prompts(*texts: str, held_out: Sequence[str] = ()) -> PromptRows:
    return PromptRows([user_prompt(text, id=text) for text in texts], [user_prompt(text, id=text) for text in held_out])


def make(
    folder: Path, rows: PromptRows, chosen: CreateSettings, policy: Chat, teacher: Chat, progress: Heard | None = None
) -> CreateSummary:
    return make_with(folder, rows, chosen, {"policy": policy, "teacher": teacher}, progress)


def make_with(
    folder: Path, rows: PromptRows, chosen: CreateSettings, chats: Mapping[str, Chat], progress: Heard | None = None
) -> CreateSummary:
    """The stage with a chat for each role."""

    async def run() -> CreateSummary:
        with ReplyStore(folder / "replies.sqlite") as store:
            remembered = {role: store.remember(chat) for role, chat in chats.items()}
            return await create(Run(folder), chosen, rows, remembered, progress or Heard())

    return asyncio.run(run())


def answer_of(request: Request) -> str:
    """The policy's answer to a prompt, long enough for a revision within the length ratio."""
    return f"The answer to {request.messages[-1].content} is known."


def student_of(request: Request) -> str:
    return request.messages[-1].content.split("{student_solution}: ")[1].split("\n\n-----")[0]


def revise(request: Request) -> str:
    return REASONED + student_of(request).replace("known", "known, because we looked")


def by_prompt(rows: Sequence[Pair]) -> dict[str, Pair]:
    return {row.prompt.id: row for row in rows}
