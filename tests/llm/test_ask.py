from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest

from anchored.errors import ModelError, ReplyError, Stopped
from anchored.llm import ask
from anchored.llm.ask import ask_all
from anchored.llm.chat import Reply, Request
from anchored.records import Message


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
    drawn: list[int] = []
    most_ahead = 0

    def requests() -> Iterator[Request]:
        for number, request in enumerate(numbers(5000)):
            drawn.append(number)
            yield request

    async def answer(text: str) -> str:
        nonlocal most_ahead
        await asyncio.sleep(0)
        most_ahead = max(most_ahead, len(drawn) - len(chat.finished))
        return text

    chat = FunctionChat(answer)
    results = asyncio.run(ask_all(chat, requests()))
    assert len(results) == 5000
    assert most_ahead <= ask.OUTSTANDING
    assert chat.most_in_flight == ask.OUTSTANDING


def test_nothing_to_ask() -> None:
    assert asyncio.run(ask_all(FunctionChat(late_if_early), [])) == []


@pytest.mark.parametrize("error", [ModelError("no such model"), Stopped("down"), RuntimeError("a bug")])
def test_what_is_not_one_rows_failure_is_raised_after_the_others_in_flight_came_back(error: Exception) -> None:
    async def answer(text: str) -> str:
        if text == "5":
            await asyncio.sleep(0.01)
            raise error
        await asyncio.sleep(0.1)
        return text

    chat = FunctionChat(answer)
    with pytest.raises(type(error), match=str(error)):
        asyncio.run(ask_all(chat, numbers(10_000)))
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
    async def answer(text: str) -> str:
        await asyncio.sleep(3600)
        return text

    async def main() -> None:
        chat = FunctionChat(answer)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ask_all(chat, numbers(10)), 0.05)
        assert chat.in_flight == 0
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_a_listener_that_fails_is_heard() -> None:
    def listen(_: int, __: Reply | ReplyError) -> None:
        raise OSError("the terminal is gone")

    with pytest.raises(OSError, match="terminal"):
        asyncio.run(ask_all(FunctionChat(late_if_early), numbers(40), on_reply=listen))
