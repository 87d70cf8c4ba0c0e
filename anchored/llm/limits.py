"""The gate before an endpoint: how many requests are in flight, and whether any may go now.

The limit shrinks when the endpoint says "too many" and grows back with each reply (additive increase, multiplicative
decrease); a pause holds everyone. First come, first served. Bound to one event loop; knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

SHRINK = 0.7


class Slot:
    """One request's right to be in flight."""

    def __init__(self, gate: Gate) -> None:
        self.held = False
        self.entered = 0.0
        """The loop's time when it was given."""
        self._gate = gate

    async def take(self, *, first: bool = False) -> None:
        """Wait in line."""
        place = self._gate.join(first=first)
        if self.held:  # given up only now: nobody slips in before
            self.held = False
            self._gate.leave()
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


class Gate:
    """Lets requests through, at most `limit` at once."""

    def __init__(self, most: int) -> None:
        self.limit = float(most)
        self.in_flight = 0
        self._most = most
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._closed_until = 0.0
        self._shrunk_at = 0.0
        self._open_for_good = False

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[Slot]:
        """Wait for a place, and hold it for the block."""
        slot = Slot(self)
        await slot.take()
        try:
            yield slot
        finally:
            if slot.held:
                self.leave()

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

    def join(self, *, first: bool = False) -> asyncio.Future[None]:
        """A place in the line; done when the slot is given."""
        place = asyncio.get_running_loop().create_future()
        if first:
            self._waiting.appendleft(place)
        else:
            self._waiting.append(place)
        self._wake()
        return place

    def leave(self) -> None:
        """Give a slot back."""
        self.in_flight -= 1
        self._wake()

    def _wake(self) -> None:
        while self._waiting and self._free():
            place = self._waiting.popleft()
            if not place.done():
                self.in_flight += 1
                place.set_result(None)

    def _free(self) -> bool:
        return self._open_for_good or (not self._closed_until and self.in_flight < int(self.limit))

    def _end_pause(self, until: float) -> None:
        if until == self._closed_until:  # else a longer pause came
            self._closed_until = 0.0
            self._wake()
