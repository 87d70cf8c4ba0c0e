"""The gate before an endpoint: how many requests are in flight, how fast they follow, and whether any may go now.

The limit shrinks when the endpoint says "too many" and grows back with each reply (additive increase, multiplicative
decrease); a pause holds everyone; requests and tokens per minute keep their pace (`rates`). First come, first served,
one in each turn of the event loop: those let through together would be made ready together, and the first be sent as
late as the last; their replies would come together too, and so on to the end. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import NamedTuple, Protocol

from anchored.llm.rates import Pace, Quotas

SHRINK = 0.7


class HeldSlot(Protocol):
    """One request's right to be in flight, whoever gave it."""

    async def renew(self) -> None: ...

    def used(self, tokens: float) -> None: ...

    def too_many(self) -> None: ...


class Limits(Protocol):
    """What stands before an endpoint: a `Gate` of this process, or one that several share (`shared`)."""

    @property
    def room(self) -> float: ...

    def slot(self, tokens: float = 0) -> AbstractAsyncContextManager[HeldSlot]: ...

    def replied(self) -> None: ...

    def heard(self, quotas: Quotas, sent: float) -> None: ...

    def pause(self, seconds: float) -> None: ...

    def open_for_good(self) -> None: ...


class Bounds(Protocol):
    """What is set of an endpoint's limits, as its settings are."""

    @property
    def concurrency(self) -> int: ...

    @property
    def requests_per_minute(self) -> float | None: ...

    @property
    def tokens_per_minute(self) -> float | None: ...


def gate_of(bounds: Bounds) -> Gate:
    """The gate that they ask for."""
    return Gate(bounds.concurrency, Pace(bounds.requests_per_minute), Pace(bounds.tokens_per_minute))


class Slot:
    """One request's right to be in flight."""

    def __init__(self, gate: Gate, tokens: float = 0) -> None:
        self.held = False
        self.entered = 0.0
        """The loop's time when it was given."""
        self._gate = gate
        self._tokens = tokens

    async def take(self, *, first: bool = False) -> None:
        """Wait in line."""
        place = self._gate.join(self._tokens, first=first)
        self.leave()  # only now: nobody slips in before
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():  # given and not taken
                self._gate.leave()
            raise
        self.held = True
        self.entered = asyncio.get_running_loop().time()

    async def renew(self) -> None:
        """Go again as soon as anyone may: what is being tried comes before what was never sent."""
        await self.take(first=True)

    def used(self, tokens: float) -> None:
        """So many tokens it took in the end."""
        self._gate.tokens.give_back(self._tokens - tokens)

    def too_many(self) -> None:
        """The request was refused for its rate."""
        self._gate.too_many(self)

    def leave(self) -> None:
        """Give it back; idempotent."""
        if self.held:
            self.held = False
            self._gate.leave()


class _Place(NamedTuple):
    """One who waits."""

    given: asyncio.Future[None]
    tokens: float


class Gate:
    """Lets requests through, at most `most` at once and at the pace of `requests` and `tokens`."""

    def __init__(self, most: int, requests: Pace | None = None, tokens: Pace | None = None) -> None:
        self.limit = float(most)
        self.in_flight = 0
        self.requests = requests or Pace()
        self.tokens = tokens or Pace()
        self._most = most
        self._waiting: deque[_Place] = deque()
        self._closed_until = 0.0
        self._shrunk_at = 0.0
        self._open_for_good = False
        self._rests = False
        """Whether somebody was let through in this turn of the loop."""
        self._alarm: asyncio.TimerHandle | None = None

    @property
    def room(self) -> float:
        """How many may be in flight; 0 while a pause holds everyone."""
        return 0.0 if self._closed_until else self.limit

    @asynccontextmanager
    async def slot(self, tokens: float = 0) -> AsyncIterator[Slot]:
        """Wait for a place for a request of about so many tokens, and hold it for the block."""
        slot = Slot(self, tokens)
        await slot.take()
        try:
            yield slot
        finally:
            slot.leave()

    def replied(self) -> None:
        """A request succeeded: a little more at once may work."""
        self.limit = min(self._most, self.limit + min(0.25, 4 / self.limit))
        self._wake()

    def too_many(self, slot: Slot) -> None:
        """The request in this slot was refused for its rate: fewer at once.

        Requests that were in flight together are refused together, and shrink the limit once.
        """
        if slot.entered >= self._shrunk_at:
            self.limit = max(1.0, self.limit * SHRINK)
            self._shrunk_at = asyncio.get_running_loop().time()

    def heard(self, quotas: Quotas, sent: float) -> None:
        """What the response to a request that was sent then, by the loop's time, says of its quotas."""
        if quotas.requests:
            self.requests.heard(quotas.requests, sent)
        if quotas.tokens:
            self.tokens.heard(quotas.tokens, sent)

    def pause(self, seconds: float) -> None:
        """Let nobody through for so long."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        if until > self._closed_until:
            self._closed_until = until
            loop.call_at(until, self._end_pause, until)

    def open_for_good(self) -> None:
        """Let everyone through from now on: nothing is sent any more, and nobody shall wait to learn it."""
        self._open_for_good = True
        self._wake()

    def join(self, tokens: float = 0, *, first: bool = False) -> asyncio.Future[None]:
        """A place in the line; done when the slot is given."""
        place = _Place(asyncio.get_running_loop().create_future(), tokens)
        if first:
            self._waiting.appendleft(place)
        else:
            self._waiting.append(place)
        self._wake()
        return place.given

    def leave(self) -> None:
        """Give a slot back."""
        self.in_flight -= 1
        self._wake()

    def _wake(self) -> None:
        while self._waiting and self._free():
            place = self._waiting[0]
            if not place.given.done() and not self._is_due():
                return
            self._waiting.popleft()
            if not place.given.done():
                self._let_through(place)

    def _let_through(self, place: _Place) -> None:
        self._rests = True
        asyncio.get_running_loop().call_soon(self._end_rest)
        now = asyncio.get_running_loop().time()
        self.requests.take(1, now)
        self.tokens.take(place.tokens, now)
        self.in_flight += 1
        place.given.set_result(None)

    def _free(self) -> bool:
        has_room = not self._rests and not self._closed_until and self.in_flight < int(self.limit)
        return self._open_for_good or has_room

    def _is_due(self) -> bool:
        """Whether the paces let the next one go; if not, an alarm is set for when they do."""
        due = max(self.requests.due(), self.tokens.due())
        loop = asyncio.get_running_loop()
        if self._open_for_good or due <= loop.time():
            return True
        if self._alarm is None or self._alarm.when() > due:
            if self._alarm is not None:
                self._alarm.cancel()
            self._alarm = loop.call_at(due, self._ring)
        return False

    def _end_rest(self) -> None:
        self._rests = False
        self._wake()

    def _ring(self) -> None:
        self._alarm = None
        self._wake()

    def _end_pause(self, until: float) -> None:
        if until == self._closed_until:  # else a longer pause came
            self._closed_until = 0.0
            self._wake()
