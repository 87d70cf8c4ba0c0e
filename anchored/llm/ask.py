"""Many requests to one chat: replies in the order of the requests, failures of single requests in their places."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from anchored.errors import ReplyError
from anchored.llm.chat import Chat, Reply, Request

OUTSTANDING = 1024
GRACE_SECONDS = 60.0


async def ask_all(
    chat: Chat, requests: Iterable[Request], *, on_reply: Callable[[int, Reply | ReplyError], None] | None = None
) -> list[Reply | ReplyError]:
    """Ask everything; `on_reply(index, result)` hears of each result as it comes.

    Requests are drawn from the iterable as they are asked, so it may be long. An error that is not a single request's
    (ModelError, Stopped, a full disk) is raised when what was in flight has come back and is stored: it may have been
    paid for.
    """
    results: dict[int, Reply | ReplyError] = {}
    numbered = enumerate(requests)
    stopped = False

    async def work() -> None:
        for index, request in numbered:
            if stopped:
                return
            try:
                result = await chat.reply(request)
            except ReplyError as error:
                result = error
            results[index] = result
            if on_reply:
                on_reply(index, result)

    workers = [asyncio.create_task(work()) for _ in range(OUTSTANDING)]
    try:
        done, running = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
        stopped = True
        if running:
            await asyncio.wait(running, timeout=GRACE_SECONDS)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    for worker in done:
        worker.result()  # raises what stopped us
    return [results[index] for index in range(len(results))]
