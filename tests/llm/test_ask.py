from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import pytest

from anchored.errors import ModelError, ReplyError, Stopped
from anchored.llm import ask
from anchored.llm.ask import ask_all, work_in_order
from anchored.llm.chat import Reply, Request
from anchored.records import Message

T = TypeVar("T")


class FunctionChat:
    """A chat whose answers are a function's."""

    name = fingerprint = "function"

    def __init__(self, answer: Callable[[str], Awaitable[str]]) -> None:
        self._answer = answer
        self.in_flight = self.most_in_flight = 0
        self.finished: list[str] = []

    async def reply(self, request: Request) -> Reply:
        text = request.messages[0].content
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            answer = await self._answer(text)
        finally:
            self.in_flight -= 1
        self.finished.append(text)
        return Reply(answer, "stop", self.name)

    async def close(self) -> None: ...


def numbers(count: int) -> Iterator[Request]:
    return (Request((Message("user", str(number)),)) for number in range(count))


async def turns(count: int) -> None:
    """Let the others run so often."""
    for _ in range(count):
        await asyncio.sleep(0)


async def within_a_minute(work: Awaitable[T]) -> T:
    """Where the code is right it takes no time at all."""
    async with asyncio.timeout(60):
        return await work


async def late_if_early(text: str) -> str:
    await asyncio.sleep(0.01 if int(text) < 10 else 0)
    if text == "13":
        raise ReplyError("unlucky")
    return f"answer {text}"


def test_results_stand_in_the_order_of_the_requests_with_failures_in_their_places() -> None:
    heard: dict[int, Reply | ReplyError] = {}
    results = asyncio.run(ask_all(FunctionChat(late_if_early), numbers(40), on_reply=heard.__setitem__))
    assert [getattr(result, "text", "failed") for result in results] == [
        "failed" if number == 13 else f"answer {number}" for number in range(40)
    ]
    assert isinstance(results[13], ReplyError)
    assert list(heard) != sorted(heard)
    assert [heard[number] for number in range(40)] == results


def test_requests_are_drawn_only_as_they_can_be_asked() -> None:
    drawn = 0
    most_ahead = 0

    def requests() -> Iterator[Request]:
        nonlocal drawn
        for request in numbers(5000):
            drawn += 1
            yield request

    async def main() -> list[Reply | ReplyError]:
        all_under_way = asyncio.Event()

        async def answer(text: str) -> str:
            nonlocal most_ahead
            if chat.in_flight == ask.OUTSTANDING:
                await turns(100)
                all_under_way.set()
            await all_under_way.wait()
            most_ahead = max(most_ahead, drawn - len(chat.finished))
            return text

        chat = FunctionChat(answer)
        return await within_a_minute(ask_all(chat, requests()))

    assert len(asyncio.run(main())) == 5000
    assert most_ahead == ask.OUTSTANDING


def test_the_first_is_under_way_before_the_last_is_drawn() -> None:
    drawn = 0
    drawn_when_asked: list[int] = []

    def items() -> Iterator[int]:
        nonlocal drawn
        for number in range(200):
            drawn += 1
            yield number

    async def work(index: int, item: int) -> int:
        await turns(3)  # what it takes to send one
        drawn_when_asked.append(drawn)
        await turns(1000)  # until its reply is there
        return item

    asyncio.run(work_in_order(items(), work, lambda _: None, outstanding=100))
    assert drawn_when_asked[0] < 10
    assert drawn_when_asked[50] < 60


def test_results_are_taken_in_the_order_of_the_items_while_others_are_under_way() -> None:
    taken: list[int] = []
    started: set[int] = set()

    async def work(index: int, item: str) -> int:
        started.add(index)
        for _ in range(7 * (index % 3)):
            await asyncio.sleep(0)
        return int(item)

    def take(result: int) -> None:
        taken.append(result)
        most_under_way.append(len(started) - len(taken))

    most_under_way: list[int] = []
    asyncio.run(work_in_order(map(str, range(500)), work, take, outstanding=20))
    assert taken == list(range(500))
    assert max(most_under_way) > 5


def test_what_comes_after_a_slow_item_waits_in_bounded_number() -> None:
    taken: list[int] = []
    drawn: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            drawn.append(number)
            yield number

    async def main() -> None:
        released, others_wait = asyncio.Event(), asyncio.Event()

        async def work(index: int, item: int) -> int:
            if index == 0:
                await released.wait()
            elif index == 49:
                others_wait.set()
            return item

        async def release() -> None:
            await others_wait.wait()
            for _ in range(100):
                await asyncio.sleep(0)
            assert (drawn[-1], taken) == (49, [])
            released.set()

        releasing = asyncio.create_task(release())
        await work_in_order(items(), work, taken.append, outstanding=10, ahead=50)
        await releasing

    asyncio.run(main())
    assert taken == list(range(1000))


def test_a_stop_reaches_those_who_wait_for_room() -> None:
    async def main() -> None:
        full = asyncio.Event()

        async def work(index: int, item: int) -> int:
            if index == 0:
                await full.wait()
                await turns(100)
                raise Stopped("down")
            if index == 49:
                full.set()
            return item

        with pytest.raises(Stopped):
            await within_a_minute(work_in_order(range(1000), work, lambda _: None, outstanding=10, ahead=50))

    asyncio.run(main())


def test_taking_that_fails_ends_the_work() -> None:
    async def work(index: int, item: int) -> int:
        await asyncio.sleep(0)
        return item

    def take(result: int) -> None:
        if result == 7:
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        asyncio.run(work_in_order(range(1000), work, take, outstanding=10))


def test_nothing_to_ask() -> None:
    assert asyncio.run(ask_all(FunctionChat(late_if_early), [])) == []


@pytest.mark.parametrize("error", [ModelError("no such model"), Stopped("down"), RuntimeError("a bug")])
def test_what_is_not_one_rows_failure_is_raised_after_the_others_in_flight_came_back(error: Exception) -> None:
    async def main() -> FunctionChat:
        all_under_way, failed, replied = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def answer(text: str) -> str:
            if chat.in_flight == ask.OUTSTANDING:
                all_under_way.set()
            if text == "5":
                await all_under_way.wait()
                failed.set()
                raise error
            await replied.wait()
            return text

        chat = FunctionChat(answer)
        asking = asyncio.create_task(ask_all(chat, numbers(10_000)))
        await within_a_minute(failed.wait())
        await turns(100)
        assert (chat.in_flight, asking.done()) == (ask.OUTSTANDING - 1, False)
        replied.set()
        with pytest.raises(type(error), match=str(error)):
            await within_a_minute(asking)
        return chat

    chat = asyncio.run(main())
    assert len(chat.finished) == ask.OUTSTANDING - 1
    assert chat.in_flight == 0


def test_those_who_never_come_back_are_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "GRACE_SECONDS", 0.05)

    async def answer(text: str) -> str:
        if text == "0":
            raise Stopped("down")
        await asyncio.sleep(3600)
        return text

    chat = FunctionChat(answer)
    with pytest.raises(Stopped):
        asyncio.run(ask_all(chat, numbers(10)))
    assert chat.in_flight == 0


def test_cancelling_cancels_all() -> None:
    async def main() -> None:
        all_under_way = asyncio.Event()

        async def answer(text: str) -> str:
            if chat.in_flight == 10:
                all_under_way.set()
            await asyncio.sleep(3600)
            return text

        chat = FunctionChat(answer)
        asking = asyncio.create_task(ask_all(chat, numbers(10)))
        await within_a_minute(all_under_way.wait())
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert chat.in_flight == 0
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_a_listener_that_fails_is_heard() -> None:
    def listen(_: int, __: Reply | ReplyError) -> None:
        raise OSError("the terminal is gone")

    with pytest.raises(OSError, match="terminal"):
        asyncio.run(ask_all(FunctionChat(late_if_early), numbers(40), on_reply=listen))
