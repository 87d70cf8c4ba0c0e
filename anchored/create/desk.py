"""Where rows are made: asks who answers in which role, writes down pairs and refusals, counts what is used.

A request that fails is a `Problem` of its row; what ends the stage (ModelError, Stopped) is raised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Protocol

from anchored.create import filters
from anchored.create.replies import Problem, Usable, check, check_text
from anchored.create.settings import POLICY, CreateSettings, candidate_role
from anchored.create.templates import templates
from anchored.datasets_io.answers import AnswerFile, JudgedData, check_readable
from anchored.errors import RecipeError, ReplyError
from anchored.llm.chat import Reply, Request
from anchored.llm.money import Money, usage_cost
from anchored.llm.prompt_files import fill
from anchored.llm.settings import Sampling
from anchored.records import Answer, Message, Outcome, Pair, Prompt


class Answering(Protocol):
    """A chat behind the store of replies, as `Remembered` is."""

    name: str
    asked: int
    hits: int

    @property
    def purse(self) -> Money | None: ...

    async def reply(self, request: Request) -> Reply: ...


CreateChats = Mapping[str, Answering]
"""Who answers, by role, each behind the store: `policy` and the roles of `CreateSettings.endpoints`."""


def check_settings(settings: CreateSettings) -> None:
    """Raise now for what would fail when the stage begins: prompts, filters, given answers that cannot be read."""
    if settings.engine == "ray" and not find_spec("ray"):
        raise RecipeError(
            'create.engine is ray, which is not installed; pip install "anchored[ray]", or set it to local'
        )
    templates(settings)
    filters.check(settings.active_filters())
    for source in (*settings.answers.values(), settings.judged):
        if source is not None:
            check_readable(source)


@dataclass(slots=True)
class Used:
    """Tokens of all replies that rows were made of, stored ones included."""

    replies: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, other: Used) -> None:
        self.replies += other.replies
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens


@dataclass(slots=True)
class Bill:
    """What one row took."""

    usd: float = 0.0
    """What the replies that it was made of cost, stored ones included."""
    used: dict[str, Used] = field(default_factory=dict)
    """By role."""
    noticed: list[str] = field(default_factory=list)
    """What was seen in it, though it was made all the same."""


_BILL: ContextVar[Bill] = ContextVar("bill")
"""Of the row that the running task makes, and the tasks that it starts."""


class Desk:
    """What every method works with; made before anything is asked, it finds what is wrong with prompts and filters."""

    def __init__(self, settings: CreateSettings, chats: CreateChats) -> None:
        self.settings = settings
        self.filters = settings.active_filters()
        self._chats = chats
        self._endpoints = settings.endpoints()
        self._prices = settings.prices()
        self._templates = templates(settings)
        filters.check(self.filters)
        self.answers = {name: AnswerFile(source, name) for name, source in settings.answers.items()}
        self.judged = _judged_data(settings)

    @property
    def purse(self) -> Money | None:
        """The run's money, where it is counted."""
        return next((chat.purse for chat in self._chats.values() if chat.purse), None)

    @contextmanager
    def bill(self) -> Iterator[Bill]:
        """The bill of the row that is made in the block."""
        bill = Bill()
        token = _BILL.set(bill)
        try:
            yield bill
        finally:
            _BILL.reset(token)

    @property
    def prompt_files(self) -> dict[str, dict[str, str]]:
        """The name and the sha256 of each prompt that teachers are asked with, by role."""
        return {role: {"prompt": one.name, "sha256": one.sha256} for role, one in self._templates.items()}

    @property
    def notes(self) -> list[str]:
        """What people should know about the answers that were given."""
        return [
            f"create.answers.{name}: {one.refused} of {one.rows + one.refused} rows of {one.source} hold no answer; "
            f"the first: {one.first_refused}"
            for name, one in self.answers.items()
            if one.refused
        ]

    async def sample(self, prompt: Prompt, index: int = 0) -> Usable | Problem:
        """The policy's answer to a prompt, the `index`-th: sampled, or found among those that were given."""
        if POLICY in self.answers:
            return self.given(POLICY, prompt, index)
        return await self._ask(POLICY, self.settings.sample, prompt.messages, "the policy's answer", index)

    async def teach(self, role: str, slots: Mapping[str, str], index: int = 0) -> Usable | Problem:
        """The reply of the teacher in a role, the `index`-th, to its prompt with those of the slots that it has."""
        template = self._templates[role]
        message = Message("user", fill(template.text, {name: slots[name] for name in template.slots}))
        return await self._ask(role, self._endpoints[role], (message,), f"the {_name(role)}'s reply", index)

    async def answer(self, prompt: Prompt) -> Usable | Problem:
        """The stronger model's own answer."""
        return await self._ask("teacher", self._endpoints["teacher"], prompt.messages, "the teacher's reply")

    async def candidate(self, place: int, prompt: Prompt) -> Usable | Problem:
        """The answer of one of the other models: of the endpoints first, then of the files."""
        endpoints = self.settings.candidates
        if place >= len(endpoints):
            return self.given(list(self.answers)[place - len(endpoints)], prompt)
        role = candidate_role(place)
        return await self._ask(role, endpoints[place], prompt.messages, f"the answer of {endpoints[place].model}")

    def candidates(self, prompt: Prompt) -> list[int]:
        """The places of those other models that can be had for a prompt: an endpoint, or a file with its answer."""
        endpoints = len(self.settings.candidates)
        in_files = [place for place, one in enumerate(self.answers.values(), endpoints) if one.find(prompt)]
        return [*range(endpoints), *in_files]

    def given(self, name: str, prompt: Prompt, index: int = 0) -> Usable | Problem:
        """An answer that exists already."""
        source = self.answers[name]
        found = source.find(prompt, index)
        if found is None:
            which = "no second answer" if index else "no answer"
            return Problem(
                Outcome.MISSING_ANSWER, f"{source.source} has {which} to this prompt (create.answers.{name})"
            )
        return check_text(found.text, found.model, f"the answer of {name} in {source.source}")

    def pair(self, prompt: Prompt, chosen: Usable, rejected: Usable, rational: str = "") -> Pair:
        """A row that came to its end."""
        return Pair(
            prompt,
            Answer(chosen.text, chosen.model),
            Answer(rejected.text, rejected.model),
            self.settings.method,
            rational,
        )

    def shown_to_judge(self, pair: Pair) -> list[str]:
        """Those texts of a finished pair that the judge has compared with others."""
        settings = self.settings
        if settings.best_of and settings.best_of.by == "judge":
            return [pair.chosen.text]
        asks = settings.method.startswith("judge") and self.judged is None
        return [pair.chosen.text, pair.rejected.text] if asks else []

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

    async def _ask(
        self, role: str, sampling: Sampling, messages: tuple[Message, ...], whose: str, index: int = 0
    ) -> Usable | Problem:
        request: Request = sampling.request(messages, index=index, seed=self.settings.prompts.seed)
        try:
            reply = await self._chats[role].reply(request)
        except ReplyError as error:
            return check(error, whose)
        bill, usage = _BILL.get(), reply.usage
        bill.used.setdefault(role, Used()).add(Used(1, usage.prompt_tokens, usage.completion_tokens))
        if price := self._prices.get(role):
            bill.usd += usage_cost(price, usage)
        return check(reply, whose)


def _name(role: str) -> str:
    return f"team's {role}" if role.startswith("step") else role


def _judged_data(settings: CreateSettings) -> JudgedData | None:
    if settings.judged_data is None:
        return None
    # the split is that of the prompts, where the pairs are in the same data
    return JudgedData(settings.judged_data, None if settings.judged else settings.prompts.split)
