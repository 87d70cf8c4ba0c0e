from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Coroutine
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import pytest
import virtual_time
from commands import POCKET, anchored_killed
from fault_server import FaultServer, completion, cuts, fails, hangs, says, sends

from anchored.errors import BudgetReached, ReplyError
from anchored.llm.ask import ask_all
from anchored.llm.chat import Reply, Request, Usage
from anchored.llm.money import Purse, Spending, cost, most_prompt_tokens, worst_case
from anchored.llm.openai_chat import OpenAIChat
from anchored.llm.replies import ReplyStore
from anchored.llm.settings import EndpointSettings, Price
from anchored.records import Message

PRICE = Price(input=2.0, output=10.0, cached_input=0.5)
T = TypeVar("T")


def a_body(text: str = "Why?", **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": 100, **more}


def a_reply(text: str = "Because.", **usage: int) -> Reply:
    return Reply(text, "stop", "m", usage=Usage(**usage))


# prices


def test_what_a_reply_costs() -> None:
    reply = a_reply(prompt_tokens=1000, completion_tokens=300, cached_tokens=600)
    assert cost(PRICE, "m", a_body(), reply) == Spending("m", pytest.approx(0.0041), "usage")
    uncached = Price(input=2.0, output=10.0)
    assert cost(uncached, "m", a_body(), reply).usd == pytest.approx(0.005)


def test_a_reply_without_usage_is_counted_from_above_but_not_above_its_worst_case() -> None:
    body = a_body("é" * 50)
    short, long = (cost(PRICE, "m", body, a_reply("é" * length)) for length in (10, 500))
    assert short == Spending("m", pytest.approx((most_prompt_tokens(body) * 2 + (20 + 16) * 10) / 1e6), "estimate")
    assert long.usd == worst_case(PRICE, body)


def test_the_worst_case_is_of_what_is_sent() -> None:
    prompt = most_prompt_tokens(a_body()) * 2
    assert worst_case(PRICE, a_body()) == pytest.approx((prompt + 1000) / 1e6)
    assert worst_case(PRICE, a_body(n=3)) == pytest.approx((prompt + 3000) / 1e6)
    body = a_body(max_completion_tokens=200)
    del body["max_tokens"]
    assert worst_case(PRICE, body) == pytest.approx((prompt + 2000) / 1e6)


@pytest.mark.parametrize(
    "text",
    [
        "Why is the sky blue? " * 20,
        "空はなぜ青いのですか。" * 20,
        "🤷🏽‍♀️" * 20,
        "x=1;\n\t\t}" * 20,
        "\u0000\u0001é́" * 20,
    ],
)
def test_no_text_has_more_tokens_than_its_worst_case(text: str) -> None:
    from anchored.llm.model_folder import load_tokenizer
    from anchored.pocket.world import policy_folder

    rendered = load_tokenizer(policy_folder()).apply_chat_template([{"role": "user", "content": text}])
    ids = rendered if isinstance(rendered, list) else rendered["input_ids"]
    assert len(ids) <= most_prompt_tokens(a_body(text))


# the purse


def test_no_moment_overdraws_the_purse_and_all_that_fits_is_spent() -> None:
    draw = random.Random(7)

    async def main() -> None:
        purse, done, refused = Purse(cap_usd=1.0), 0, 0

        async def attempt() -> None:
            nonlocal done, refused
            worst = draw.uniform(0.001, 0.02)
            try:
                async with purse.reserved("m", worst) as reservation:
                    assert purse.spent_usd + purse._reserved_usd <= 1.0 + 1e-9
                    await asyncio.sleep(draw.random())
                    if draw.random() < 0.1:
                        reservation.release()
                    else:
                        reservation.settle(Spending("m", worst * draw.random(), "usage"))
                done += 1
            except BudgetReached:
                refused += 1

        await asyncio.gather(*(attempt() for _ in range(1000)))
        assert 0.98 < purse.spent_usd <= 1.0
        assert done > 100
        assert refused == 1000 - done
        assert purse.spent().run_usd == pytest.approx(sum(one.usd for one in purse.take_unlisted()))

    virtual_time.run(main())


def test_a_large_request_is_not_passed_over_for_small_ones() -> None:
    order: list[float] = []

    async def main() -> None:
        purse = Purse(cap_usd=1.0)

        async def attempt(worst: float) -> None:
            async with purse.reserved("m", worst) as reservation:
                order.append(worst)
                await asyncio.sleep(1)
                reservation.release()

        await asyncio.gather(*map(attempt, (0.6, 0.9, 0.1, 0.2)))

    virtual_time.run(main())
    assert order == [0.6, 0.9, 0.1, 0.2]


def test_those_who_wait_may_be_cancelled() -> None:
    async def main() -> None:
        purse = Purse(cap_usd=1.0)
        release = asyncio.Event()

        async def attempt() -> None:
            async with purse.reserved("m", 0.8) as reservation:
                await release.wait()
                reservation.release()

        holds, waits, last = (asyncio.create_task(attempt()) for _ in range(3))
        await asyncio.sleep(1)
        waits.cancel()
        release.set()
        await asyncio.gather(holds, last)
        # given and cancelled in one turn of the loop
        release.clear()
        holds, waits = (asyncio.create_task(attempt()) for _ in range(2))
        await asyncio.sleep(1)
        holds.cancel()
        await asyncio.sleep(0)
        waits.cancel()
        await asyncio.gather(holds, waits, return_exceptions=True)
        assert purse._in_flight == 0
        assert purse._reserved_usd == pytest.approx(0)
        assert purse.spent_usd == 0.8  # of `holds` alone, whose attempt was under way

    virtual_time.run(main())


def test_what_earlier_processes_spent_counts() -> None:
    async def main() -> None:
        purse = Purse(
            0.5, [Spending("m", 0.3, "usage"), Spending("m", 0.1, "unsure"), Spending("judge", 0.05, "usage")]
        )
        async with purse.reserved("m", 0.04) as reservation:
            reservation.settle(Spending("m", 0.02, "usage"))
        spent = purse.spent()
        assert (spent.run_usd, spent.process_usd) == (pytest.approx(0.47), pytest.approx(0.02))
        assert spent.by_chat == {"m": pytest.approx(0.42), "judge": pytest.approx(0.05)}
        assert spent.by_basis == {"usage": pytest.approx(0.37), "unsure": pytest.approx(0.1)}
        with pytest.raises(BudgetReached, match=r"0\.5 USD, 0\.47 USD are spent \(0\.1 USD of it .*up to 0\.04 USD"):
            async with purse.reserved("m", 0.04):
                pass
        with pytest.raises(BudgetReached):  # ever after
            async with purse.reserved("m", 0.0001):
                pass

    asyncio.run(main())


# through an endpoint


def use(
    server: FaultServer,
    purse: Purse,
    work: Callable[[OpenAIChat], Coroutine[Any, Any, T]],
    run: Callable[[Coroutine[Any, Any, T]], T] = asyncio.run,
    **settings: Any,
) -> T:
    async def main() -> T:
        given = {"model": "m", "base_url": server.base_url, "price": PRICE, "max_tokens": 100} | settings
        chat = OpenAIChat(EndpointSettings(**given), purse=purse)
        try:
            return await work(chat)
        finally:
            await chat.close()

    return run(main())


def a_request(text: str = "Why?", max_tokens: int = 100) -> Request:
    return Request((Message("user", text),), max_tokens=max_tokens)


WORST = worst_case(PRICE, a_body())
COST = (7 * 2 + 3 * 10) / 1e6  # of the fault server's usage


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize(
    ("fault", "unsure"),
    [
        (fails(500), 0),
        (fails(503), 0),
        (fails(429, headers={"Retry-After": "0.01"}), 0),
        (fails(502), 1),
        (fails(504), 1),
        (cuts(), 1),
        (sends("no json"), 1),
        (sends('{"choices": []}'), 1),
        (None, 1),
    ],
)
def test_an_attempt_that_may_have_been_billed_is_counted_apart(server: FaultServer, fault: Any, unsure: int) -> None:
    """The last: no reply in time."""
    purse, clock = Purse(), virtual_time.Leaps()
    server.script = [fault or hangs(clock.leap)]
    use(server, purse, lambda chat: chat.reply(a_request()), clock.run, timeout_seconds=600)
    by_basis = {"usage": pytest.approx(COST)} | ({"unsure": pytest.approx(WORST)} if unsure else {})
    assert purse.spent().by_basis == by_basis


def test_an_attempt_that_reached_nobody_costs_nothing(server: FaultServer) -> None:
    purse = Purse()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
        with pytest.raises(Exception, match="nothing answers"):
            use(server, purse, lambda chat: chat.reply(a_request()), base_url=url, retries=0)
    with pytest.raises(ReplyError, match="surrogate"):
        use(server, purse, lambda chat: chat.reply(a_request("\ud83d")))
    assert purse.spent_usd == 0


def test_a_cancelled_attempt_may_have_been_billed(server: FaultServer) -> None:
    purse = Purse()
    server.always = hangs()

    async def work(chat: OpenAIChat) -> None:
        task = asyncio.create_task(chat.reply(a_request()))
        while not server.in_flight:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    use(server, purse, work)
    assert purse.spent().by_basis == {"unsure": pytest.approx(WORST)}


def test_thinking_is_output_and_cached_tokens_have_their_price(server: FaultServer) -> None:
    payload = completion("42")
    payload["usage"] = {
        "prompt_tokens": 1000,
        "completion_tokens": 20,  # some leave the thinking out of these
        "total_tokens": 1320,
        "prompt_tokens_details": {"cached_tokens": 600},
    }

    async def act(_: Any) -> Any:
        from aiohttp import web

        return web.json_response(payload)

    purse = Purse()
    server.script = [act]
    reply = use(server, purse, lambda chat: chat.reply(a_request(max_tokens=4000)))
    assert reply.usage == Usage(1000, 320, 600)
    assert purse.spent_usd == pytest.approx((400 * 2 + 600 * 0.5 + 320 * 10) / 1e6)


def test_the_cap_holds_at_any_concurrency_and_what_is_stored_costs_nothing(server: FaultServer, tmp_path: Path) -> None:
    """What the server saw, at its prices, is no more than the cap, and the run goes on where the money ended."""
    requests = [a_request(f"question {number}") for number in range(300)]
    cap = 100 * COST + WORST
    server.always = says("fine", after=0.02)

    async def work(chat: OpenAIChat) -> None:
        remembered = store.remember(chat, purse)
        try:
            await ask_all(remembered, requests)
        finally:
            await remembered.close()

    with ReplyStore(tmp_path / "replies.sqlite") as store:
        purse = Purse(cap)
        with pytest.raises(BudgetReached, match=r"raise create\.budget_usd and the same command goes on") as raised:
            use(server, purse, work)
        assert raised.value.exit_code == 3
        assert 95 < len(server.seen) <= 101
        assert len(server.seen) * COST <= cap
        assert store.spent() == [Spending("m", pytest.approx(purse.spent_usd), "usage")]
        assert store.count() == len(server.seen)
    with ReplyStore(tmp_path / "replies.sqlite") as store:
        purse = Purse(301 * COST + WORST, store.spent())
        use(server, purse, work)
        assert len(server.seen) == 300
        assert purse.spent_usd == pytest.approx(300 * COST)
        assert purse.spent().process_usd < 210 * COST
    with ReplyStore(tmp_path / "replies.sqlite") as store:  # nothing left to spend, and nothing to pay for
        purse = Purse(1e-9, store.spent())
        use(server, purse, work)
    assert len(server.seen) == 300


def test_attempts_without_a_reply_are_kept_too(server: FaultServer, tmp_path: Path) -> None:
    clock = virtual_time.Leaps()
    server.script = [says("fine"), hangs(clock.leap)]

    async def work(chat: OpenAIChat) -> None:
        remembered = store.remember(chat, purse)
        await remembered.reply(a_request("1"))
        with pytest.raises(ReplyError):
            await remembered.reply(a_request("2"))
        await remembered.close()

    with ReplyStore(tmp_path / "replies.sqlite") as store:
        purse = Purse()
        use(server, purse, work, clock.run, timeout_seconds=600, retries=0)
        assert {one.basis: one.usd for one in store.spent()} == {
            "usage": pytest.approx(COST),
            "unsure": pytest.approx(worst_case(PRICE, a_body("2"))),
        }


KILLED = """
import asyncio, sys
from anchored.llm.ask import ask_all
from anchored.llm.chat import Request
from anchored.llm.money import Purse
from anchored.llm.openai_chat import OpenAIChat
from anchored.llm.replies import ReplyStore
from anchored.llm.settings import EndpointSettings
from anchored.records import Message

async def main():
    with ReplyStore(sys.argv[1]) as store:
        purse = Purse(10.0, store.spent())
        price = {"input": 2.0, "output": 10.0}
        chat = OpenAIChat(EndpointSettings(model="m", base_url=sys.argv[2], price=price), purse=purse)
        remembered = store.remember(chat, purse)
        requests = (Request((Message("user", f"{n}"),)) for n in range(100_000))
        await ask_all(remembered, requests, on_reply=lambda index, _: print(index, flush=True))

asyncio.run(main())
"""


def test_a_killed_process_leaves_what_its_stored_replies_cost(server: FaultServer, tmp_path: Path) -> None:

    path = tmp_path / "replies.sqlite"
    server.always = says("fine", after=0.01)
    command = [sys.executable, "-c", KILLED, str(path), server.base_url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for given, _ in enumerate(process.stdout):
            if given == 200:
                process.send_signal(signal.SIGKILL)
                break
    with ReplyStore(path) as store:
        (spent,) = store.spent()
        assert store.count() > 200
        assert spent.usd == pytest.approx(store.count() * COST)


def test_money_that_could_not_be_kept_is_kept_later(tmp_path: Path) -> None:
    class Chat:
        name = fingerprint = "m"

        async def reply(self, request: Request) -> Reply:
            async with purse.reserved("m", 1.0):
                return a_reply()

        async def close(self) -> None: ...

    async def main() -> None:
        with ReplyStore(tmp_path / "replies.sqlite") as store, sqlite3.connect(store.path) as other:
            other.execute("alter table spending rename to elsewhere")
            remembered = store.remember(Chat(), purse)
            with pytest.raises(Exception, match="no such table"):
                await remembered.reply(a_request())
            other.execute("alter table elsewhere rename to spending")
            await remembered.close()
            assert store.spent() == [Spending("m", 1.0, "unsure")]

    purse = Purse()
    asyncio.run(main())


def test_ctrl_c_counts_what_was_in_flight(server: FaultServer, tmp_path: Path) -> None:
    server.script = [says("no revision")] * 3 + [hangs()] * 6
    recipe = (
        *("create.prompts.take=8", "create.prompts.held_out=1", "create.sample.batch_size=16"),
        *("create.reviser.serve=null", f"create.reviser.base_url={server.base_url}", "create.reviser.key_env=null"),
        *("create.reviser.price={input: 0, output: 10}", "create.reviser.max_tokens=1000"),
    )

    def three_are_kept_and_six_under_way() -> bool:
        if server.in_flight < 6:
            return False
        with closing(sqlite3.connect(tmp_path / "run" / "replies.sqlite")) as store:
            kept = store.execute("select count(*) from replies where model like 'pocket-teacher%'").fetchone()[0]
        return kept == 3

    code = anchored_killed(
        *("create", POCKET, *recipe, "--out", tmp_path / "run"),
        when=three_are_kept_and_six_under_way,
        by=signal.SIGINT,
    )
    assert code == 3
    with ReplyStore(tmp_path / "run" / "replies.sqlite") as store:
        spent = {one.basis: one.usd for one in store.spent()}
    assert spent == {"usage": pytest.approx(3 * 30 / 1e6), "unsure": pytest.approx(6 * 0.01)}


def test_that_replies_come_without_usage_is_said_once(server: FaultServer, caplog: pytest.LogCaptureFixture) -> None:
    payload = completion("fine")
    del payload["usage"]
    server.always = sends(json.dumps(payload))
    purse = Purse()
    use(server, purse, lambda chat: ask_all(chat, [a_request(str(number)) for number in range(5)]))
    assert list(purse.spent().by_basis) == ["estimate"]
    assert [record.levelname for record in caplog.records if "sends no usage" in record.message] == ["WARNING"]
