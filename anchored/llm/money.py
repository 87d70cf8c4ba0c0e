"""Money: what requests may cost and what replies did cost, and the purse that no attempt can overdraw.

Before an attempt is sent its worst case is set aside in the purse; its reply's usage takes the place of that. An
attempt that broke off or timed out may have been billed, so its worst case stays spent, and is counted apart. All that
was spent is listed for the store of replies, whose next transaction keeps it (`replies`).
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from anchored.errors import BudgetReached
from anchored.llm.chat import Reply, Usage
from anchored.llm.settings import Price

MILLION = 1_000_000
# no tokenizer makes more tokens of a text than it has bytes; what a template puts around it is some tens at most
TOKENS_AROUND_A_MESSAGE = 16
TOKENS_AROUND_A_PROMPT = 64
ROUNDING = 1e-9
_EVALUATE = "evaluate: "

Basis = Literal[
    "usage",  # by the reply's own count of tokens
    "estimate",  # the reply came without one: counted by its bytes, from above
    "unsure",  # an attempt that ended without a reply and may have been billed: its worst case
]


Stage = Literal["create", "evaluate"]
"""What is paid for; each has a budget of its own."""


@dataclass(frozen=True, slots=True)
class Spending:
    """Money that is gone."""

    model: str
    usd: float
    basis: Basis


@dataclass(frozen=True, slots=True)
class Spent:
    """Sums of what was spent, in USD."""

    run_usd: float
    """In this run, all processes and chats together."""
    process_usd: float
    """Of that, by this process."""
    by_chat: dict[str, float]
    """Of the run's, by the model's name."""
    by_basis: dict[str, float]
    """Of the run's: by the endpoint's own count, by ours where it sent none, and for attempts without a reply."""


def worst_case(price: Price, body: Mapping[str, Any]) -> float:
    """The most that a request with this JSON can cost, in USD."""
    most = body.get("max_completion_tokens", body.get("max_tokens", 0))
    samples = body.get("n", 1)
    return (most_prompt_tokens(body) * price.input + samples * most * price.output) / MILLION


def cost(price: Price, model: str, body: Mapping[str, Any], reply: Reply) -> Spending:
    """What the reply to a request with this JSON cost."""
    usage = reply.usage
    if not usage.prompt_tokens and not usage.completion_tokens:
        written = len((reply.text + reply.reasoning).encode("utf-8", "replace")) + TOKENS_AROUND_A_MESSAGE
        usd = min(worst_case(price, body), (most_prompt_tokens(body) * price.input + written * price.output) / MILLION)
        return Spending(model, usd, "estimate")
    return Spending(model, usage_cost(price, usage), "usage")


def usage_cost(price: Price, usage: Usage) -> float:
    """What these tokens cost, in USD."""
    cached_input = price.input if price.cached_input is None else price.cached_input
    new = usage.prompt_tokens - usage.cached_tokens
    usd = new * price.input + usage.cached_tokens * cached_input + usage.completion_tokens * price.output
    return usd / MILLION


def most_prompt_tokens(body: Mapping[str, Any]) -> int:
    """The most tokens that a request's messages can be."""
    messages = body["messages"]
    written = sum(len(message["content"].encode("utf-8", "replace")) for message in messages)
    return written + TOKENS_AROUND_A_MESSAGE * len(messages) + TOKENS_AROUND_A_PROMPT


class Reservation:
    """Money set aside for one attempt."""

    def __init__(self, model: str, usd: float) -> None:
        self.usd = usd
        """What is set aside."""
        self.spending: Spending | None = Spending(model, usd, "unsure")
        """What the attempt cost, as far as is known."""

    def settle(self, spending: Spending) -> None:
        """This is what it cost."""
        self.spending = spending

    def release(self) -> None:
        """It cost nothing."""
        self.spending = None


class Reserves(Protocol):
    """What attempts are paid from: the `Purse` of this process, or one that several share (`shared`)."""

    def reserved(self, model: str, usd: float) -> AbstractAsyncContextManager[Reservation]: ...


class Money(Protocol):
    """What tells how much is spent."""

    @property
    def spent_usd(self) -> float: ...

    def spent(self) -> Spent: ...


class Purse:
    """The money of a run's stage, for all its chats: what is spent, what is set aside, how much there may be in all.

    Bound to one event loop. `before` is what earlier processes spent on any stage, as the store kept it.
    """

    def __init__(self, cap_usd: float | None = None, before: Iterable[Spending] = (), stage: Stage = "create") -> None:
        self.cap_usd = cap_usd
        """None: counted, not bounded."""
        self._stage = stage
        # in a run's store the stages' spendings lie side by side
        self._label = _EVALUATE if stage == "evaluate" else ""
        self._spent: Counter[tuple[str, Basis]] = Counter()
        self._spent_usd = 0.0
        for spending in before:
            if spending.model.startswith(_EVALUATE) == (stage == "evaluate"):
                self.add(replace(spending, model=spending.model.removeprefix(self._label)))
        self._before_usd = self._spent_usd
        self._reserved_usd = self._apart_usd = 0.0
        self._in_flight = 0
        self._waiting: deque[_Waiting] = deque()
        self._unlisted: list[Spending] = []
        self._over: str | None = None

    @property
    def spent_usd(self) -> float:
        """What is spent in this run so far."""
        return self._spent_usd

    def spent(self) -> Spent:
        """The same, taken apart."""
        by_chat: Counter[str] = Counter()
        by_basis: Counter[str] = Counter()
        for (model, basis), usd in self._spent.items():
            by_chat[model] += usd
            by_basis[basis] += usd
        return Spent(self._spent_usd, self._spent_usd - self._before_usd, dict(by_chat), dict(by_basis))

    @asynccontextmanager
    async def reserved(self, model: str, usd: float) -> AsyncIterator[Reservation]:
        """`usd` set aside while the block sends one attempt, or its wait until others have settled and there is enough.

        What the block neither settles nor releases is spent. Raises BudgetReached if there is not enough though
        nothing is in flight, then and ever after.
        """
        await self.set_aside(usd)
        reservation = Reservation(model, usd)
        try:
            yield reservation
        finally:
            self.settle(usd, reservation.spending)

    @contextmanager
    def held(self, usd: float) -> Iterator[None]:
        """`usd` set aside for the block, whether it is there or not: for what is sent already, or passed `has`."""
        self._reserved_usd += usd
        self._in_flight += 1
        try:
            yield
        finally:
            self._take_back(usd)

    def set_apart(self, usd: float) -> None:
        """`usd` set aside for as long as this process lasts: for what others may spend yet."""
        self._reserved_usd += usd
        self._apart_usd += usd

    def spend(self, spending: Spending) -> None:
        """Money that is gone."""
        self.add(spending)
        self._unlisted.append(replace(spending, model=f"{self._label}{spending.model}"))

    def add(self, spending: Spending) -> None:
        """Money that is gone, and in the store already."""
        self._spent[spending.model, spending.basis] += spending.usd  # pyright: ignore[reportArgumentType]
        self._spent_usd += spending.usd

    def take_unlisted(self) -> list[Spending]:
        """What was spent since the last call, for the store; `list_again` gives back what it could not keep."""
        taken, self._unlisted = self._unlisted, []
        return taken

    def list_again(self, spendings: Iterable[Spending]) -> None:
        self._unlisted[:0] = spendings

    async def set_aside(self, usd: float) -> None:
        """The first half of `reserved`."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(usd, place))
        self._serve()
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and not place.exception():  # given and not taken
                self._take_back(usd)
            raise

    def settle(self, usd: float, spending: Spending | None) -> None:
        """Its second half: of `usd` that were set aside, this was spent."""
        if spending:
            self.spend(spending)
        self._take_back(usd)

    def _take_back(self, usd: float) -> None:
        self._reserved_usd -= usd
        self._in_flight -= 1
        self._serve()

    def _serve(self) -> None:
        """Give to those who wait, in their order: a large request is not passed over for small ones."""
        while self._waiting:
            usd, place = self._waiting[0].usd, self._waiting[0].place
            if place.done():  # cancelled
                pass
            elif self._over is None and self.has(usd):
                self._reserved_usd += usd
                self._in_flight += 1
                place.set_result(None)
            elif self._over is None and self._in_flight:
                return
            else:
                self._over = self._over or self._why_over(usd)
                place.set_exception(BudgetReached(self._over))
            self._waiting.popleft()

    def has(self, usd: float) -> bool:
        """Whether so much is neither spent nor set aside."""
        return self.cap_usd is None or self._spent_usd + self._reserved_usd + usd <= self.cap_usd + ROUNDING

    def _why_over(self, usd: float) -> str:
        unsure = sum(spent for (_, basis), spent in self._spent.items() if basis == "unsure")
        of_which = f" ({dollars(unsure)} of it for attempts without a reply, which may have been billed)"
        apart = f", {dollars(self._apart_usd)} are set aside for batches of models that the recipe does not ask now"
        gone = f"{dollars(self._spent_usd)} are spent{of_which if unsure else ''}{apart if self._apart_usd else ''}"
        return (
            f"{self._stage}.budget_usd is {dollars(self.cap_usd or 0)}, {gone} and the next request may cost up to "
            f"{dollars(usd)}; raise {self._stage}.budget_usd and the same command goes on, nothing is paid for twice"
        )


@dataclass(frozen=True, slots=True)
class _Waiting:
    """An attempt that is not sent yet."""

    usd: float
    place: asyncio.Future[None]


def dollars(usd: float) -> str:
    """An amount for people: cents, or four significant digits where it is less than a dollar."""
    return f"{usd:,.2f} USD" if usd >= 1 or usd == 0 else f"{usd:.4g} USD"
