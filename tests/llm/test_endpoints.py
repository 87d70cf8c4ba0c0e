from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack
from typing import Any, TypeVar

import pytest
from aiohttp import web
from commands import STUCK_SECONDS
from fault_server import Act, FaultServer, answers_together, fails, hangs_up, says

from anchored.errors import BudgetReached, ModelError, ReplyError, Stopped
from anchored.llm.ask import ask_all
from anchored.llm.chat import Reply, Request
from anchored.llm.endpoints import Endpoints, open_endpoints
from anchored.llm.money import Purse
from anchored.llm.openai_chat import OpenAIChat
from anchored.llm.settings import EndpointSettings
from anchored.records import Message

T = TypeVar("T")
pytestmark = pytest.mark.usefixtures("quick_retries")


@pytest.fixture
def servers() -> Iterator[list[FaultServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(FaultServer()) for _ in range(3)]


def settings(servers: list[FaultServer], **more: Any) -> EndpointSettings:
    first, *others = servers
    return EndpointSettings(
        model="m", base_url=first.base_url, more_endpoints=[{"base_url": other.base_url} for other in others], **more
    )


def use(
    servers: list[FaultServer],
    work: Callable[[OpenAIChat | Endpoints], Coroutine[Any, Any, T]],
    purse: Purse | None = None,
    **more: Any,
) -> T:
    async def main() -> T:
        chat = open_endpoints(settings(servers, **more), purse=purse)
        try:
            return await work(chat)
        finally:
            await chat.close()

    return asyncio.run(main())


def requests(count: int) -> list[Request]:
    return [Request((Message("user", str(number)),), max_tokens=50) for number in range(count)]


def texts(replies: list[Reply | ReplyError]) -> Counter[str]:
    return Counter(reply.text if isinstance(reply, Reply) else str(reply) for reply in replies)


def test_one_endpoint_needs_no_more() -> None:
    assert isinstance(open_endpoints(EndpointSettings(model="m", base_url="http://127.0.0.1:9/v1")), OpenAIChat)


def test_the_store_is_the_same_for_all() -> None:
    one = EndpointSettings(model="m", base_url="http://127.0.0.1:9/v1", extra_body={"a": 1})
    more = one.model_copy(update={"more_endpoints": EndpointSettings(model="m").more_endpoints})
    assert open_endpoints(one).fingerprint == open_endpoints(more).fingerprint


def test_the_faster_an_endpoint_is_the_more_it_gets(servers: list[FaultServer]) -> None:
    first = servers[0]

    def slower(times: int) -> Act:
        """Answers when the first was asked so often meanwhile, or there is nothing left to ask."""

        async def act(request: web.Request) -> web.StreamResponse:
            until = len(first.seen) + times
            while len(first.seen) < until and sum(len(server.seen) for server in servers) < 300:
                await asyncio.sleep(0.001)
            return await says("fine")(request)

        return act

    servers[1].always, servers[2].always = slower(8), slower(40)
    replies = use(servers, lambda chat: ask_all(chat, requests(300)), concurrency=4)
    assert texts(replies) == {"fine": 300}
    fast, middle, slow = (len(server.seen) for server in servers)
    assert fast > middle > slow > 0
    assert max(server.most_in_flight for server in servers) <= 4


@pytest.mark.parametrize(
    ("fault", "says_so"),
    [
        (fails(401, {"message": "bad key"}), "401: bad key"),
        (fails(402, {"message": "Insufficient Balance"}), "no money is left"),
        (fails(404, {"message": "no such model"}), "404: no such model"),
        (fails(429, headers={"Retry-After": "86400"}), "asks to wait"),
        (fails(503), "is down"),
        (hangs_up(), "is down"),
    ],
)
def test_one_that_ends_is_set_aside_once_and_no_row_is_lost(
    servers: list[FaultServer], fault: Any, says_so: str, caplog: pytest.LogCaptureFixture
) -> None:
    servers[0].always = fault
    more = {"concurrency": 4, "retries": 1, "stop_after_failures": 3}
    replies = use(servers, lambda chat: ask_all(chat, requests(100)), **more)
    assert texts(replies) == {"fine": 100}
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "2 of 3 endpoints go on" in warnings[0]
    assert says_so in warnings[0]
    assert len(servers[0].seen) <= 12


def test_when_none_is_left_all_reasons_are_given(servers: list[FaultServer]) -> None:
    servers[0].always = fails(401, {"message": "bad key"})
    servers[1].always = fails(402, {"message": "Insufficient Balance"})
    servers[2].always = fails(404, {"message": "no such model"})
    with pytest.raises(Stopped, match=r"none of 3 .*bad key.*Insufficient Balance.*no such model") as raised:
        use(servers, lambda chat: ask_all(chat, requests(100)))
    assert "\n" not in str(raised.value)
    servers[1].always = servers[2].always = servers[0].always
    with pytest.raises(ModelError, match=r"none of 3 .*bad key"):
        use(servers, lambda chat: chat.check())


def test_a_check_sets_aside_what_does_not_answer(servers: list[FaultServer], caplog: pytest.LogCaptureFixture) -> None:
    servers[1].always = fails(401, {"message": "bad key"})

    async def work(chat: OpenAIChat | Endpoints) -> list[Reply | ReplyError]:
        await chat.check()
        return await ask_all(chat, requests(30))

    assert texts(use(servers, work)) == {"fine": 30}
    assert not servers[1].seen
    assert "bad key" in caplog.text


def test_what_one_endpoint_fails_to_answer_another_is_asked(servers: list[FaultServer]) -> None:
    servers[0].script = [fails(500)] * 2
    replies = use(servers, lambda chat: ask_all(chat, requests(1)), retries=1)
    assert texts(replies) == {"fine": 1}
    for server in servers:
        server.always = fails(500, {"message": "cuda error"})
    (failed,) = use(servers, lambda chat: ask_all(chat, requests(1)), retries=1)
    assert isinstance(failed, ReplyError)
    assert "cuda error" in str(failed)


def test_a_bad_row_is_the_same_everywhere(servers: list[FaultServer]) -> None:
    for server in servers:
        server.always = fails(400, {"message": "too long"})
    (failed,) = use(servers, lambda chat: ask_all(chat, requests(1)))
    assert "too long" in str(failed)
    assert sum(len(server.seen) for server in servers) == 1


def test_the_purse_is_one_and_its_end_sets_nobody_aside(
    servers: list[FaultServer], caplog: pytest.LogCaptureFixture
) -> None:
    purse = Purse(0.05)
    with pytest.raises(BudgetReached):
        use(servers, lambda chat: ask_all(chat, requests(2000)), purse, price={"input": 0, "output": 100})
    assert 0.05 - 50 * 100 / 1e6 <= purse.spent_usd <= 0.05
    assert not caplog.records


def test_each_address_gets_its_own_key(servers: list[FaultServer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_1", "first-key")
    monkeypatch.setenv("KEY_2", "second-key")
    given = EndpointSettings(
        model="m",
        base_url=servers[0].base_url,
        key_env="KEY_1",
        more_endpoints=[
            {"base_url": servers[0].base_url, "key_env": "KEY_2"},
            {"base_url": servers[1].base_url},
        ],  # pyright: ignore[reportArgumentType]
    )

    async def main() -> None:
        chat = open_endpoints(given)
        await ask_all(chat, requests(30))
        await chat.close()

    for server in servers:
        server.always = says("fine", after=0.02)
    asyncio.run(main())
    assert {seen.headers["Authorization"] for seen in servers[0].seen} == {"Bearer first-key", "Bearer second-key"}
    assert all("Authorization" not in seen.headers for seen in servers[1].seen)


FEW_FILES = """
import asyncio, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 4096))
from anchored.llm.ask import ask_all
from anchored.llm.chat import Request
from anchored.llm.endpoints import open_endpoints
from anchored.llm.settings import EndpointSettings
from anchored.records import Message

async def main():
    chat = open_endpoints(EndpointSettings(model="m", base_url=sys.argv[1], concurrency=200))
    requests = [Request((Message("user", str(n)),)) for n in range(400)]
    print(sum(reply.text == "fine" for reply in await ask_all(chat, requests)))
    await chat.close()

asyncio.run(main())
"""


def test_as_many_connections_as_set_may_be_open(servers: list[FaultServer]) -> None:
    servers[0].always = answers_together(servers[0], 200, says("fine"))
    command = [sys.executable, "-c", FEW_FILES, servers[0].base_url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=STUCK_SECONDS, check=False)
    assert done.stdout.strip() == "400", done.stderr
    assert servers[0].most_in_flight == 200
