from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from anchored.llm.alike import ENOUGH, WatchedChat
from anchored.llm.chat import Reply, Request
from anchored.records import Message


class Says:
    """A chat that answers with a function of the request."""

    name = fingerprint = "says"

    def __init__(self, text: Callable[[Request], str]) -> None:
        self._text = text

    async def reply(self, request: Request) -> Reply:
        return Reply(self._text(request), "stop", self.name)

    async def close(self) -> None: ...


def notes_of(
    text: Callable[[Request], str], *, prompts: int, indices: tuple[int, ...] = (0, 1), temperature: float = 1.0
) -> list[str]:
    notes: list[str] = []
    chat = WatchedChat(Says(text), notes.append)

    async def ask() -> None:
        for prompt in range(prompts):
            for index in indices:
                request = Request((Message("user", f"prompt {prompt}"),), index=index, temperature=temperature)
                assert (await chat.reply(request)).text == text(request)

    asyncio.run(ask())
    return notes


def test_equal_samples_of_every_prompt_are_said_once() -> None:
    notes = notes_of(lambda request: "always this", prompts=5 * ENOUGH, temperature=0.7)
    assert len(notes) == 1
    assert "at temperature 0.7" in notes[0]
    assert "ignore temperature and seed" in notes[0]


@pytest.mark.parametrize(
    ("text", "prompts", "indices", "temperature"),
    [
        (lambda request: f"sample {request.index}", 50, (0, 1), 0.7),
        # one prompt whose samples differ shows that the server draws
        (lambda request: f"{request.index * request.messages[0].content.endswith('3')}", 50, (0, 1), 0.7),
        (lambda request: "always this", ENOUGH - 1, (0, 1), 0.7),
        (lambda request: "always this", 50, (0,), 0.7),
        (lambda request: "always this", 50, (0, 0), 0.7),
        (lambda request: "always this", 50, (0, 1), 0.0),
    ],
    ids=["different", "one different", "too few", "one sample each", "the same sample again", "greedy"],
)
def test_nothing_is_said_of_a_server_that_may_draw(
    text: Callable[[Request], str], prompts: int, indices: tuple[int, ...], temperature: float
) -> None:
    assert not notes_of(text, prompts=prompts, indices=indices, temperature=temperature)


def test_few_texts_are_held_where_nobody_asks_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anchored.llm.alike._MOST_WAITING", 10)
    chat = WatchedChat(Says(lambda _: "x"), lambda _: None)

    async def ask() -> None:
        for prompt in range(50):
            await chat.reply(Request((Message("user", str(prompt)),)))

    asyncio.run(ask())
    assert len(chat._first) <= 11
