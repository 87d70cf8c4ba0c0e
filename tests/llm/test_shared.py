"""Limits, money and replies that several workers share, over a wire that is a call in this process."""

from __future__ import annotations

import asyncio
import itertools
import pickle
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from virtual_time import run as run_in_virtual_time

from anchored.errors import AnchoredError, BudgetReached, DataError, Stopped
from anchored.llm.chat import Reply, Request, Usage
from anchored.llm.money import Spending
from anchored.llm.replies import Entry, ReplyStore, request_key
from anchored.llm.settings import EndpointSettings
from anchored.llm.shared import Books, Heard, Hub, Line, Said, books_of, hand_over
from anchored.records import Message


class Direct:
    """A wire that takes its time, and carries copies as one between machines does."""

    def __init__(self, hub: Hub, worker: str) -> None:
        self.hub, self.worker = hub, worker
        self.said: list[int] = []
        """How many words went together."""

    async def say(self, words: Sequence[Said]) -> None:
        self.said.append(len(words))
        await asyncio.sleep(0.001)
        await self.hub.say(self.worker, pickle.loads(pickle.dumps(words)))

    async def hear(self) -> list[Heard]:
        heard = await self.hub.hear(self.worker)
        await asyncio.sleep(0.001)
        return pickle.loads(pickle.dumps(heard))


class Worker:
    def __init__(self, hub: Hub, name: str, node_store: ReplyStore | None = None) -> None:
        self.wire = Direct(hub, name)
        self.line = Line(self.wire)
        self.books: Books = books_of(name, self.line, counts_money=True, node_store=node_store)


def endpoint(**more: Any) -> EndpointSettings:
    return EndpointSettings.model_validate({"model": "m", "base_url": "http://127.0.0.1:1/v1", **more})


def request(number: int) -> Request:
    return Request((Message("user", f"question {number}"),))


def at(tmp_path: Path, main: Callable[[Hub], Awaitable[None]], cap_usd: float | None = None) -> None:
    async def with_hub() -> None:
        hub = Hub(tmp_path / "replies.sqlite", cap_usd)
        await main(hub)
        await hub.close()

    asyncio.run(with_hub())


def test_all_workers_together_have_no_more_in_flight_than_is_set(tmp_path: Path) -> None:
    async def main(hub: Hub) -> None:
        workers = [Worker(hub, f"worker {number}") for number in range(3)]
        now = most = 0

        async def ask(worker: Worker) -> None:
            nonlocal now, most
            gate = gates[worker]
            async with gate.slot() as slot:
                for _ in range(2):
                    now += 1
                    most = max(most, now)
                    await asyncio.sleep(0.002)
                    now -= 1
                    await slot.renew()

        gates = {worker: worker.books.limits(endpoint(concurrency=5)) for worker in workers}
        await asyncio.gather(*(ask(worker) for worker in workers for _ in range(20)))
        assert most == 5
        assert max(workers[0].wire.said) > 5, "what is said at the same time goes together"
        for worker in workers:
            await worker.line.close()

    at(tmp_path, main)


def test_the_rate_of_all_workers_together_is_the_one_that_is_set(tmp_path: Path) -> None:
    sent: list[float] = []

    async def main() -> None:
        hub = Hub(tmp_path / "replies.sqlite")
        workers = [Worker(hub, f"worker {number}") for number in range(3)]

        async def ask(gate: Any) -> None:
            async with gate.slot():
                sent.append(asyncio.get_running_loop().time())

        gates = [worker.books.limits(endpoint(requests_per_minute=60)) for worker in workers]
        await asyncio.gather(*(ask(gate) for gate in gates for _ in range(50)))
        await hub.close()

    run_in_virtual_time(main())
    assert len(sent) == 150
    for first, later in zip(sent, sent[61:], strict=False):
        assert later - first >= 60 - 0.01


def test_what_a_lost_worker_held_is_free_again_and_its_money_is_spent(tmp_path: Path) -> None:
    async def main(hub: Hub) -> None:
        lost, other = Worker(hub, "lost"), Worker(hub, "other")
        bounds = endpoint(concurrency=2)

        async def hang() -> None:
            assert lost.books.purse
            async with lost.books.limits(bounds).slot(), lost.books.purse.reserved("m", 0.25):
                await asyncio.sleep(3600)

        hanging = [asyncio.create_task(hang()) for _ in range(4)]
        while len(lost.line._asked) != 2:  # two are in flight, two wait for a slot
            await asyncio.sleep(0.001)
        hub.lose("lost")
        async with asyncio.timeout(60):
            gate = other.books.limits(bounds)
            async with gate.slot(), gate.slot():
                pass
        assert hub.spent().by_basis == {"unsure": 0.5}
        for task in hanging:
            task.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)
        with pytest.raises(Stopped, match="lost was out of reach"):
            await lost.books.replies.look_up("m", request(1))
        assert hub.spent().run_usd == 0.5, "what it says too late changes nothing"

    at(tmp_path, main)


def test_the_cap_holds_over_all_workers_and_a_lost_one(tmp_path: Path) -> None:
    async def main(hub: Hub) -> None:
        workers = [Worker(hub, f"worker {number}") for number in range(3)]
        sent = itertools.count()
        done = 0

        async def ask(worker: Worker) -> None:
            nonlocal done
            assert worker.books.purse
            async with worker.books.purse.reserved("m", 0.1) as reservation:
                next(sent)
                await asyncio.sleep(0.002)
                reservation.settle(Spending("m", 0.04, "usage"))
                done += 1

        asking = [asyncio.create_task(ask(worker)) for worker in workers for _ in range(20)]
        while done < 5:
            await asyncio.sleep(0.001)
        hub.lose("worker 0")
        results = await asyncio.gather(*asking[20:], return_exceptions=True)
        refused = [result for result in results if result is not None]
        assert refused
        assert {type(error) for error in refused} == {BudgetReached}
        assert next(sent) <= 25
        assert 0.9 < hub.spent().run_usd <= 1.0
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)

    at(tmp_path, main, cap_usd=1.0)


def test_a_reply_of_one_worker_is_known_to_the_others_with_what_it_cost(tmp_path: Path) -> None:
    class Paid:
        name = fingerprint = "m"

        def __init__(self, worker: Worker) -> None:
            self.worker, self.asked = worker, 0

        async def reply(self, request: Request) -> Reply:
            self.asked += 1
            assert self.worker.books.purse
            async with self.worker.books.purse.reserved("m", 0.1) as reservation:
                reservation.settle(Spending("m", 0.04, "usage"))
            return Reply("said", "stop", "m", usage=Usage(1, 1), raw={"whole": True})

        async def close(self) -> None: ...

    async def main(hub: Hub) -> None:
        workers = [Worker(hub, f"worker {number}") for number in range(2)]
        chats = [Paid(worker) for worker in workers]
        remembered = [worker.books.remember(chat, paid=True) for worker, chat in zip(workers, chats, strict=True)]
        await asyncio.gather(*(remembered[0].reply(request(1)) for _ in range(3)))
        assert (await remembered[1].reply(request(1))).text == "said"
        assert [chat.asked for chat in chats] == [1, 0]
        assert [(one.asked, one.hits) for one in remembered] == [(1, 2), (0, 1)]
        assert hub.store.count() == 1
        assert hub.store.spent() == [Spending("m", 0.04, "usage")]

    at(tmp_path, main)


def test_what_cannot_be_kept_is_paid_for_by_no_worker(tmp_path: Path) -> None:
    async def main(hub: Hub) -> None:
        one, other = Worker(hub, "one"), Worker(hub, "other")
        hub.store.failure = "the disk takes no more"
        with pytest.raises(DataError, match="the disk takes no more"):
            async with one.books.limits(endpoint()).slot():
                raise AssertionError
        assert other.books.purse
        with pytest.raises(DataError, match="the disk takes no more"):
            async with other.books.purse.reserved("m", 1):
                raise AssertionError

    at(tmp_path, main)


def entries(numbers: Sequence[int]) -> list[Entry]:
    return [Entry("m", request(number), Reply(f"said {number}", "stop", "m", raw={"of": number})) for number in numbers]


def test_what_the_hub_cannot_keep_stays_on_the_node_and_is_merged_when_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = tmp_path / "node.sqlite"

    def full(*_: object) -> None:
        raise DataError("the disk takes no more")

    async def stopped(hub: Hub) -> None:
        with ReplyStore(node) as store:
            worker = Worker(hub, "worker 1", store)
            await worker.books.replies.keep(entries([1, 2]))
            with monkeypatch.context() as patch:
                patch.setattr(hub.store, "put_rows", full)
                with pytest.raises(DataError, match="takes no more"):
                    await worker.books.replies.keep(entries([2, 3, 4]))
            hub.store.failure = ""
        assert hub.store.count() == 2

    async def goes_on(hub: Hub) -> None:
        with ReplyStore(node) as store:
            await hand_over(store, Worker(hub, "worker 2").line)
            assert store.count() == 0
        kept = [hub.store.get(request_key("m", request(number))) for number in range(1, 5)]
        assert [(one.text, one.raw) for one in kept if one] == [(f"said {one}", {"of": one}) for one in range(1, 5)]

    at(tmp_path, stopped)
    at(tmp_path, goes_on)


def test_a_node_lets_go_of_what_the_hub_has_and_does_without_a_store_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise DataError("the node's disk takes no more")

    async def main(hub: Hub) -> None:
        with ReplyStore(tmp_path / "node.sqlite") as store:
            replies = Worker(hub, "worker 1", store).books.replies
            for number in range(300):
                await replies.keep(entries([number]))
            assert 0 < store.count() < 256
            monkeypatch.setattr(store, "put_rows", full)
            for number in (300, 301):
                await replies.keep(entries([number]))
        assert hub.store.count() == 302

    at(tmp_path, main)
    assert [record.getMessage() for record in caplog.records] == [
        "replies are kept in the run folder alone, not on this node: the node's disk takes no more"
    ]


def test_a_worker_whose_endpoint_has_ended_lets_its_own_go_and_holds_no_slot(tmp_path: Path) -> None:
    async def main(hub: Hub) -> None:
        ended, other = Worker(hub, "ended"), Worker(hub, "other")
        bounds = endpoint(concurrency=1)
        gate, others = ended.books.limits(bounds), other.books.limits(bounds)
        let_go = asyncio.Event()

        async def wait() -> None:
            async with gate.slot():
                let_go.set()

        async with others.slot():
            waiting = [asyncio.create_task(wait()) for _ in range(3)]
            await asyncio.sleep(0.02)
            assert not let_go.is_set()
            gate.open_for_good()
            await asyncio.gather(*waiting)
        async with asyncio.timeout(60), others.slot():
            pass

    at(tmp_path, main)


def test_without_its_hub_a_worker_waits_for_nothing() -> None:
    class Cut:
        async def say(self, words: Sequence[Said]) -> None:
            raise Stopped("gone")

        async def hear(self) -> list[Heard]:
            await asyncio.sleep(3600)
            raise AssertionError

    async def main() -> None:
        line = Line(Cut())
        for _ in range(2):
            with pytest.raises(AnchoredError, match="gone"):
                await line.ask("look_up", "m", request(1))
        line.tell("leave", 1)
        await line.close()

    asyncio.run(main())
