"""Event loops whose clocks jump.

To whatever is due next, so that hours of waiting pass in no time, exactly; or when told to, so that a reply with an
hour's time is late when the test says so, however slow the machine is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Loop(asyncio.SelectorEventLoop):
    now = 1000.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        waiting = [handle.when() for handle in self._scheduled if not handle.cancelled()]  # type: ignore[attr-defined]
        if not self._ready and waiting:  # type: ignore[attr-defined]
            self.now = max(self.now, min(waiting))
        super()._run_once()  # type: ignore[misc]


def run(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, in virtual time."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(work)


class Leaps:
    """A loop whose clock is the machine's, until `leap` puts it forward, an hour by itself; from any thread."""

    def __init__(self) -> None:
        self._loop = _Leaping()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """`asyncio.run`, by this clock; once."""
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            return runner.run(work)

    def leap(self, seconds: float = 3600) -> None:
        self._loop.call_soon_threadsafe(self._loop.leap, seconds)


class _Leaping(asyncio.SelectorEventLoop):
    ahead = 0.0

    def time(self) -> float:
        return super().time() + self.ahead

    def leap(self, seconds: float) -> None:
        self.ahead += seconds
