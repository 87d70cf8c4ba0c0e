"""Many things asked at once: results in the order of what was asked, a bounded number under way, clean stops."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from anchored.errors import ReplyError
from anchored.llm.chat import Chat, Reply, Request

OUTSTANDING = 1024
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
    """`await work(index, item)` for every item, at most `outstanding` at once; the results in the items' order.

    Items are drawn as they are worked on, so there may be many. What any `work` raises is raised when what was under
    way has ended and is stored, for it may have been paid for.
    """
    results: dict[int, Result] = {}
    numbered = enumerate(items)
    stopped = False

    async def worker() -> None:
        for index, item in numbered:
            if stopped:
                return
            results[index] = await work(index, item)

    workers = [asyncio.create_task(worker()) for _ in range(outstanding)]
    try:
        done, running = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
        stopped = True
        if running:
            await asyncio.wait(running, timeout=GRACE_SECONDS)
    finally:
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    for task in done:
        task.result()  # raises what stopped us
    return [results[index] for index in range(len(results))]
