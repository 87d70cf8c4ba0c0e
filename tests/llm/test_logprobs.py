from __future__ import annotations

import asyncio
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from fault_server import Act, FaultServer, completion, fails, says

from anchored.llm.chat import Reply, Request
from anchored.llm.openai_chat import OpenAIChat
from anchored.llm.replies import Entry, ReplyStore, request_key
from anchored.llm.responses import read_reply
from anchored.llm.settings import EndpointSettings
from anchored.records import Message

PLAIN = Request((Message("user", "m or M?"),), temperature=1, max_tokens=1)
GRADED = replace(PLAIN, top_logprobs=5)


def likely(**tokens: float) -> dict[str, Any]:
    """What an endpoint tells of one place."""
    told = [{"token": token, "logprob": value, "bytes": [109]} for token, value in tokens.items()]
    return {**told[0], "top_logprobs": told}


def tells(*places: dict[str, Any]) -> Act:
    async def act(_: web.Request) -> web.StreamResponse:
        answer = completion("M", finish_reason="length")
        answer["choices"][0]["logprobs"] = {"content": list(places)}
        return web.json_response(answer)

    return act


def ask(server: FaultServer, *requests: Request) -> list[Reply]:
    async def main() -> list[Reply]:
        chat = OpenAIChat(EndpointSettings(model="gpt-test", base_url=server.base_url))
        try:
            return [await chat.reply(request) for request in requests]
        finally:
            await chat.close()

    return asyncio.run(main())


def test_the_likeliest_tokens_come_back_where_they_are_asked_for(server: FaultServer) -> None:
    server.always = tells(likely(M=-0.25, m=-1.5), likely(**{"!": -0.1}))
    [reply] = ask(server, GRADED)
    assert reply.logprobs == ({"M": -0.25, "m": -1.5}, {"!": -0.1})
    assert server.seen[0].body["logprobs"] is True
    assert server.seen[0].body["top_logprobs"] == 5


def test_nothing_is_asked_of_who_need_not_tell(server: FaultServer) -> None:
    server.always = says("M")
    [reply] = ask(server, PLAIN)
    assert reply.logprobs == ()
    assert not {"logprobs", "top_logprobs"} & server.seen[0].body.keys()


@pytest.mark.parametrize(
    "error",
    [
        {"message": "Unsupported parameter: 'logprobs' is not supported with this model.", "param": "logprobs"},
        {"message": "top_logprobs: Extra inputs are not permitted"},
    ],
)
def test_an_endpoint_that_cannot_tell_is_asked_without(server: FaultServer, error: dict[str, str]) -> None:
    server.script = [fails(400, error)]
    server.always = says("M")
    first, second = ask(server, GRADED, GRADED)
    assert (first.text, first.logprobs, second.text) == ("M", (), "M")
    assert len(server.seen) == 3
    assert not {"logprobs", "top_logprobs"} & (server.seen[1].body | server.seen[2].body).keys()


@pytest.mark.parametrize(
    ("told", "read"),
    [
        (None, ()),
        ([], ()),
        ({"content": None}, ()),
        ({"content": [None, {"top_logprobs": None}]}, ({}, {})),
        ({"content": [{"top_logprobs": [{"token": "m", "logprob": "-1"}, {"token": None, "logprob": -1}, 7]}]}, ({},)),
        ({"content": [likely(m=float("-inf"), x=-1)]}, ({"x": -1.0},)),
        ({"content": [likely(m=float("nan"), M=-1)]}, ({},)),
        ({"content": [{"top_logprobs": [{"token": "?", "logprob": v} for v in (-3, -1, -2)]}]}, ({"?": -1.0},)),
    ],
)
def test_what_is_no_log_probability_is_not_told(told: Any, read: tuple[dict[str, float], ...]) -> None:
    answer = completion("M")
    answer["choices"][0]["logprobs"] = told
    reply = read_reply(answer, "gpt-test", 1, 0.0)
    assert isinstance(reply, Reply)
    assert reply.logprobs == read


def test_the_store_keeps_them_under_a_key_of_their_own(tmp_path: Path) -> None:
    assert request_key("judge", GRADED) != request_key("judge", PLAIN)
    assert request_key("judge", GRADED) != request_key("judge", replace(GRADED, top_logprobs=4))
    reply = Reply("M", "length", "judge", logprobs=({"M": -0.25, "m": -1.5},))
    with ReplyStore(tmp_path / "replies.sqlite") as store:
        store.put([Entry("judge", GRADED, reply), Entry("judge", PLAIN, replace(reply, logprobs=()))])
    with ReplyStore(tmp_path / "replies.sqlite") as store:
        assert store.find("judge", GRADED) == reply
        assert store.find("judge", PLAIN) == replace(reply, logprobs=())


def test_other_rows_of_the_store_are_as_they_were(tmp_path: Path) -> None:
    with ReplyStore(tmp_path / "replies.sqlite") as store:
        store.put([Entry("judge", PLAIN, Reply("M", "stop", "judge"))])
    [row] = sqlite3.connect(tmp_path / "replies.sqlite").execute("select request, reply from replies")
    assert "logprobs" not in "".join(row)
