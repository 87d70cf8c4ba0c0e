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
    async def slot(self) -> AsyncIterator[float]:
        """Wait for a place, hold it for the block; gives the loop's time of entering."""
        await self._enter()
        try:
            yield asyncio.get_running_loop().time()
        finally:
            self._leave()

    def replied(self) -> None:
        """A request succeeded: a little more at once may work."""
        self.limit = min(self._most, self.limit + min(0.25, 4 / self.limit))
        self._wake()

    def too_many(self, entered: float) -> None:
        """The request that entered then was refused for its rate: fewer at once.

        Requests that were in flight together are refused together, and shrink the limit once.
        """
        if entered >= self._shrunk_at:
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

    async def _enter(self) -> None:
        if self._free() and not self._waiting:
            self.in_flight += 1
            return
        place = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():  # given and not taken
                self._leave()
            raise

    def _leave(self) -> None:
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
