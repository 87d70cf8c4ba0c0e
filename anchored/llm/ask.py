"""Many things asked at once: results in the order of what was asked, a bounded number under way, clean stops."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterable
from typing import Generic, TypeVar

from anchored.errors import ReplyError
from anchored.llm.chat import Chat, Reply, Request

OUTSTANDING = 1024
AHEAD = 8 * OUTSTANDING
"""Results that wait for a slow one before them, and so the memory they take."""
GRACE_SECONDS = 60.0

Item = TypeVar("Item")
Result = TypeVar("Result")


async def ask_all(
    chat: Chat, requests: Iterable[Request], *, on_reply: Callable[[int, Reply | ReplyError], None] | None = None
) -> list[Reply | ReplyError]:
    """The replies to all requests, failures of single ones in their places; `on_reply(index, result)` hears of each."""

    async def ask(index: int, request: Request) -> Reply | ReplyError:
        try:
            result: Reply | ReplyError = await chat.reply(request)
        except ReplyError as error:
            result = error
        if on_reply:
            on_reply(index, result)
        return result

    return await work_through(requests, ask)


async def work_through(
    items: Iterable[Item], work: Callable[[int, Item], Awaitable[Result]], outstanding: int = OUTSTANDING
) -> list[Result]:
    """`await work(index, item)` for every item, at most `outstanding` at once; the results in the items' order."""
    results: list[Result] = []
    await work_in_order(items, work, results.append, outstanding=outstanding, ahead=sys.maxsize)
    return results


async def work_in_order(
    items: Iterable[Item],
    work: Callable[[int, Item], Awaitable[Result]],
    take: Callable[[Result], None],
    *,
    outstanding: int = OUTSTANDING,
    ahead: int = AHEAD,
    on_failure: Callable[[], None] = lambda: None,
) -> None:
    """`await work(index, item)` for every item, at most `outstanding` at once; `take(result)` in the items' order.

    Items are drawn as they are worked on, and none that is more than `ahead` of the next result to take, so there may
    be many of both. What any `work` raises is raised when what was under way has ended and is stored, for it may have
    been paid for; `on_failure` is called before that wait, to end what is not under way yet.
    """
    line = _Line(items, take, ahead)
    starting = asyncio.Lock()

    async def worker() -> None:
        async with starting:  # one after the other, so that the first is under way before the last is made ready
            await asyncio.sleep(0)
        while (numbered := await line.draw()) is not None:
            line.put(numbered[0], await work(*numbered))

    workers = [asyncio.create_task(worker()) for _ in range(outstanding)]
    try:
        done, running = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
        line.stop()
        if running:
            on_failure()
            await asyncio.wait(running, timeout=GRACE_SECONDS)
    finally:
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    for task in done:
        task.result()  # raises what stopped us


class _Line(Generic[Item, Result]):
    """Items in, results out, both in the same order, with a bounded distance between the two ends."""

    def __init__(self, items: Iterable[Item], take: Callable[[Result], None], ahead: int) -> None:
        self._items = enumerate(items)
        self._take = take
        self._ahead = ahead
        self._drawn = 0
        self._taken = 0
        self._waiting: dict[int, Result] = {}
        """Results whose turn has not come."""
        self._moved = asyncio.Event()
        self._stopped = False

    async def draw(self) -> tuple[int, Item] | None:
        """The next item with its number, when there is room for its result; None when there is no more to do."""
        while self._drawn - self._taken >= self._ahead and not self._stopped:
            self._moved.clear()
            await self._moved.wait()
        numbered = None if self._stopped else next(self._items, None)
        self._drawn += numbered is not None
        return numbered

    def put(self, number: int, result: Result) -> None:
        """Hand in an item's result; all whose turn has come are taken."""
        self._waiting[number] = result
        while self._taken in self._waiting:
            self._take(self._waiting.pop(self._taken))
            self._taken += 1
            self._moved.set()

    def stop(self) -> None:
        """Draw no more."""
        self._stopped = True
        self._moved.set()
