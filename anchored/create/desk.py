"""Where rows are made: asks the policy and the teacher, writes down pairs and refusals, counts what is used.

A request that fails is a `Problem` of its row; what ends the stage (ModelError, Stopped) is raised.
"""

from __future__ import annotations

from dataclasses import dataclass

from anchored.create.replies import Problem, Usable, check
from anchored.create.settings import CreateSettings, StrongerSettings
from anchored.errors import ReplyError
from anchored.llm.chat import Request
from anchored.llm.prompt_files import fill, load
from anchored.llm.replies import Remembered
from anchored.records import Answer, Message, Pair, Prompt


@dataclass(frozen=True, slots=True)
class CreateChats:
    """The two who answer, both behind the store."""

    policy: Remembered
    teacher: Remembered


@dataclass(slots=True)
class Used:
    """Tokens of all replies that rows were made of, stored ones included."""

    replies: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Desk:
    """What every method works with."""

    def __init__(self, settings: CreateSettings, chats: CreateChats) -> None:
        self.settings = settings
        self.policy, self.teacher = Used(), Used()
        self._chats = chats
        self._template = _template(settings)

    async def sample(self, prompt: Prompt, index: int = 0) -> Usable | Problem:
        """The policy's answer to a prompt, the `index`-th."""
        request = self.settings.sample.request(prompt.messages, index=index, seed=self.settings.prompts.seed)
        return await _ask(self._chats.policy, request, self.policy, "the policy's answer")

    async def teach(self, **slots: str) -> Usable | Problem:
        """The teacher's reply to its prompt with these slots filled in."""
        return await self.answer(Message("user", fill(self._template, slots)))

    async def answer(self, *messages: Message) -> Usable | Problem:
        """The teacher's reply to these messages."""
        request = self.settings.teacher().request(messages, seed=self.settings.prompts.seed)
        return await _ask(self._chats.teacher, request, self.teacher, "the teacher's reply")

    def pair(self, prompt: Prompt, chosen: Usable, rejected: Usable, rational: str = "") -> Pair:
        """A row that came to its end."""
        return Pair(
            prompt,
            Answer(chosen.text, chosen.model),
            Answer(rejected.text, rejected.model),
            self.settings.method,
            rational,
        )

    def refused(self, prompt: Prompt, problem: Problem, rejected: Usable | None = None, model: str = "") -> Pair:
        """A row that ended before; `model` wrote what the problem has of a chosen answer."""
        return Pair(
            prompt,
            Answer(problem.text if rejected else "", model),
            Answer(rejected.text, rejected.model) if rejected else Answer(problem.text),
            self.settings.method,
            outcome=problem.outcome,
            detail=problem.detail,
        )


def _template(settings: CreateSettings) -> str:
    """The teacher's prompt, found to have the right slots before anything is asked; empty where it has none."""
    teacher = settings.teacher()
    if isinstance(teacher, StrongerSettings):
        return ""
    template = load(teacher.prompt)
    fill(template, dict.fromkeys(teacher.slots, ""))
    return template


async def _ask(chat: Remembered, request: Request, used: Used, whose: str) -> Usable | Problem:
    try:
        reply = await chat.reply(request)
    except ReplyError as error:
        return check(error, whose)
    used.replies += 1
    used.prompt_tokens += reply.usage.prompt_tokens
    used.completion_tokens += reply.usage.completion_tokens
    return check(reply, whose)
