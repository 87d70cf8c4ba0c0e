"""A stored reply under another `max_tokens`: what ended by itself is not asked again, what was cut is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from anchored.llm.ask import ask_all
from anchored.llm.chat import Reply, Request, Usage
from anchored.llm.replies import Entry, ReplyStore
from anchored.records import Message


def a_request(max_tokens: int, text: str = "Why?") -> Request:
    return Request((Message("user", text),), max_tokens=max_tokens)


def a_reply(text: str, tokens: int, finish_reason: str = "stop") -> Reply:
    return Reply(text, finish_reason, "m", usage=Usage(5, tokens))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ReplyStore]:
    with ReplyStore(tmp_path / "replies.sqlite") as store:
        yield store


def put(store: ReplyStore, max_tokens: int, reply: Reply) -> None:
    store.put([Entry("m", a_request(max_tokens), reply)])


@pytest.mark.parametrize(
    ("stored_limit", "reply", "limit", "serves"),
    [
        (100, a_reply("whole", 40), 200, True),
        (100, a_reply("whole", 0), 200, True),  # of unknown length, but under a lower limit
        (100, a_reply("cut", 100, "length"), 200, False),
        (100, a_reply("filtered", 40, "content_filter"), 200, False),
        (200, a_reply("whole", 40), 100, True),
        (200, a_reply("longer than the limit", 140), 100, False),
        (200, a_reply("at the limit: its end may not fit", 100), 100, False),
        (200, a_reply("of unknown length", 0), 100, False),
        (200, a_reply("cut", 200, "length"), 100, False),
        (200, a_reply("cut", 200, "length"), 200, True),
    ],
)
def test_which_reply_serves_which_limit(
    store: ReplyStore, stored_limit: int, reply: Reply, limit: int, serves: bool
) -> None:
    put(store, stored_limit, reply)
    assert store.find("m", a_request(limit)) == (reply if serves else None)


def test_its_own_reply_comes_first_and_then_that_of_the_highest_limit(store: ReplyStore) -> None:
    for limit in (100, 400, 200):
        put(store, limit, a_reply(f"under {limit}", 40))
    texts = [store.find("m", a_request(limit)) for limit in (100, 200, 300)]
    assert [reply.text if reply else None for reply in texts] == ["under 100", "under 200", "under 400"]


@pytest.mark.parametrize(
    "other",
    [
        replace(a_request(200), temperature=0.1),
        replace(a_request(200), top_p=0.5),
        replace(a_request(200), index=1),
        replace(a_request(200), seed=1),
        a_request(200, "Why not?"),
    ],
)
def test_nothing_else_may_differ(store: ReplyStore, other: Request) -> None:
    put(store, 100, a_reply("whole", 40))
    assert store.find("m", other) is None
    assert store.find("other model", a_request(200)) is None


class Writer:
    """Writes texts of 10, 20, ... 100 tokens, cut at the limit."""

    name = fingerprint = "m"

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    async def reply(self, request: Request) -> Reply:
        text = request.messages[0].content
        self.asked.append((text, request.max_tokens))
        wanted = int(text)
        if wanted > request.max_tokens:
            return a_reply(f"half of {text}", request.max_tokens, "length")
        return a_reply(f"all of {text}", wanted)

    async def close(self) -> None: ...


def test_another_limit_asks_only_what_it_changes(store: ReplyStore) -> None:
    writer = Writer()
    lengths = range(10, 101, 10)

    def ask(limit: int) -> list[str]:
        writer.asked.clear()
        requests = [a_request(limit, str(length)) for length in lengths]
        replies = asyncio.run(ask_all(store.remember(writer), requests))
        return [reply.text if isinstance(reply, Reply) else "failed" for reply in replies]

    def expected(limit: int) -> list[str]:
        return [f"{'all' if length <= limit else 'half'} of {length}" for length in lengths]

    assert ask(45) == expected(45)
    assert len(writer.asked) == 10
    assert ask(75) == expected(75)
    assert [text for text, _ in writer.asked] == ["50", "60", "70", "80", "90", "100"]
    assert ask(200) == expected(200)
    assert [text for text, _ in writer.asked] == ["80", "90", "100"]
    assert ask(75) == expected(75)  # back again: all there
    assert writer.asked == []
    assert ask(25) == expected(25)
    assert [text for text, _ in writer.asked] == [str(length) for length in lengths if length > 25]
