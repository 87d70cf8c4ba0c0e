from __future__ import annotations

import asyncio

import pytest
import virtual_time

from anchored.llm.limits import Gate, Slot
from anchored.llm.rates import Pace, Quota, Quotas


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(20):
        await asyncio.sleep(0)


class Holder:
    """A task that holds a slot until it is told to end."""

    def __init__(self, gate: Gate) -> None:
        self.inside = False
        self.renews = asyncio.Event()
        self.ends = asyncio.Event()
        self.task = asyncio.create_task(self._hold(gate))

    async def _hold(self, gate: Gate) -> None:
        async with gate.slot() as slot:
            self.inside = True
            await self.renews.wait()
            self.inside = False
            await slot.renew()
            self.inside = True
            await self.ends.wait()


def inside(holders: list[Holder]) -> list[bool]:
    return [holder.inside for holder in holders]


async def cancel(holders: list[Holder]) -> None:
    for holder in holders:
        holder.task.cancel()
    await asyncio.gather(*(holder.task for holder in holders), return_exceptions=True)


def test_slots_are_given_in_order_and_a_renewal_goes_before_newcomers() -> None:
    async def main() -> None:
        gate = Gate(2)
        holders = [Holder(gate) for _ in range(4)]
        await settle()
        assert inside(holders) == [True, True, False, False]
        holders[0].renews.set()
        await settle()
        assert inside(holders) == [True, True, False, False]
        holders[0].ends.set()
        await settle()
        assert inside(holders)[1:] == [True, True, False]
        await cancel(holders)
        assert gate.in_flight == 0

    asyncio.run(main())


def test_one_is_let_through_in_each_turn_of_the_loop() -> None:
    """So the first is sent before the last is made ready, and their replies come apart."""

    async def main() -> None:
        gate = Gate(10)
        holders = [Holder(gate) for _ in range(12)]

        async def went_in() -> list[int]:
            """How many are inside after each turn, without repetitions."""
            counts: list[int] = []
            for _ in range(20):
                await asyncio.sleep(0)
                counts.append(sum(inside(holders)))
            return sorted(set(counts))

        assert await went_in() == list(range(1, 11))
        for holder in holders[:10]:  # all at once
            holder.renews.set()
        assert await went_in() == list(range(1, 11))
        await cancel(holders)
        assert gate.in_flight == 0

    asyncio.run(main())


def test_a_pause_holds_newcomers_and_renewals_and_the_longest_counts() -> None:
    async def main() -> None:
        gate = Gate(10)
        early = Holder(gate)
        await settle()
        started = asyncio.get_running_loop().time()
        gate.pause(0.15)
        gate.pause(0.05)
        early.renews.set()
        late = Holder(gate)
        await settle()
        assert inside([early, late]) == [False, False]
        while not late.inside:
            await asyncio.sleep(0.005)
        assert asyncio.get_running_loop().time() - started >= 0.15
        assert early.inside
        await cancel([early, late])

    virtual_time.run(main())


def test_the_limit_shrinks_once_for_what_was_in_flight_together_and_grows_back() -> None:
    async def main() -> None:
        gate = Gate(64)
        async with gate.slot() as first, gate.slot() as second:
            await asyncio.sleep(0.001)
            gate.too_many(first)
            gate.too_many(second)
        assert gate.limit == pytest.approx(44.8)
        async with gate.slot() as third:
            gate.too_many(third)
        assert gate.limit == pytest.approx(31.36)
        replies = 0
        while gate.limit < 64:
            gate.replied()
            replies += 1
        assert 300 < replies < 600
        assert gate.limit == 64

    asyncio.run(main())


def test_the_limit_never_falls_below_one() -> None:
    async def main() -> None:
        gate = Gate(3)
        for _ in range(20):
            async with gate.slot() as slot:
                gate.too_many(slot)
        assert gate.limit == 1

    asyncio.run(main())


def test_a_smaller_limit_lets_nobody_in_until_enough_have_left() -> None:
    async def main() -> None:
        gate = Gate(4)
        holders = [Holder(gate) for _ in range(6)]
        await settle()
        for _ in range(2):
            refused = Slot(gate)
            refused.entered = asyncio.get_running_loop().time()
            gate.too_many(refused)
        assert int(gate.limit) == 1
        for holder in holders[:3]:
            holder.renews.set()
            holder.ends.set()
            await settle()
        assert inside(holders)[3:] == [True, False, False]
        await cancel(holders)

    asyncio.run(main())


def test_cancelled_waiters_leak_no_slot() -> None:
    async def main() -> None:
        gate = Gate(1)
        holders = [Holder(gate) for _ in range(3)]
        await settle()
        await cancel(holders[1:2])
        # the slot is given to the last and it is cancelled in the same turn of the loop
        holders[0].task.cancel()
        await asyncio.sleep(0)
        await cancel(holders)
        assert gate.in_flight == 0
        async with asyncio.timeout(60), gate.slot():
            pass

    asyncio.run(main())


def test_an_open_gate_lets_everyone_through_in_spite_of_a_pause() -> None:
    async def main() -> None:
        gate = Gate(1)
        gate.pause(3600)
        holders = [Holder(gate) for _ in range(3)]
        await settle()
        assert inside(holders) == [False] * 3
        gate.open_for_good()
        await settle()
        assert inside(holders) == [True] * 3
        await cancel(holders)

    asyncio.run(main())


async def send(gate: Gate, tokens: float, sent: list[float], *, seconds: float = 0.1, fails: int = 0) -> None:
    loop = asyncio.get_running_loop()
    async with gate.slot(tokens) as slot:
        for _ in range(fails):
            sent.append(loop.time())
            await asyncio.sleep(seconds)
            await slot.renew()
        sent.append(loop.time())
        await asyncio.sleep(seconds)


def test_requests_keep_their_pace_and_nobody_starves() -> None:
    async def main() -> None:
        gate, sent = Gate(64, requests=Pace(120)), []
        async with asyncio.TaskGroup() as group:
            for number in range(360):
                group.create_task(send(gate, 0, sent, fails=number % 10 == 0))
        assert len(sent) == 396
        assert sent[-1] - sent[0] == pytest.approx(396 / 2, rel=0.02)
        for begin in sent:
            assert sum(begin <= at < begin + 60 - 1e-6 for at in sent) <= 120

    virtual_time.run(main())


def test_the_scarcer_of_requests_and_tokens_sets_the_pace() -> None:
    async def main() -> None:
        gate, sent = Gate(64, Pace(600), Pace(60_000)), []
        await asyncio.gather(*(send(gate, 1000, sent) for _ in range(121)))
        assert sent[-1] - sent[0] == pytest.approx(120, rel=0.02)

    virtual_time.run(main())


def test_tokens_that_were_not_used_let_others_go_sooner() -> None:
    async def main() -> None:
        gate, sent = Gate(64, tokens=Pace(60_000)), []

        async def send_a_short_one() -> None:
            async with gate.slot(4000) as slot:
                sent.append(asyncio.get_running_loop().time())
                await asyncio.sleep(0.5)
                slot.used(1000)

        await asyncio.gather(*(send_a_short_one() for _ in range(121)))
        assert 120 * 0.98 < sent[-1] - sent[0] < 120 * 1.1

    virtual_time.run(main())


def test_a_retry_goes_before_what_was_never_sent_under_a_pace_too() -> None:
    async def main() -> None:
        gate, order = Gate(64, requests=Pace(60)), []

        async def send_twice(name: str) -> None:
            async with gate.slot() as slot:
                order.append(name)
                await slot.renew()
                order.append(f"{name} again")

        await asyncio.gather(*(send_twice(name) for name in "abc"))
        assert order == ["a", "a again", "b", "b again", "c", "c again"]

    virtual_time.run(main())


def test_an_end_lets_those_who_wait_for_their_pace_through_at_once() -> None:
    async def main() -> None:
        gate, sent = Gate(64, requests=Pace(1)), []
        started = asyncio.get_running_loop().time()
        tasks = [asyncio.create_task(send(gate, 0, sent)) for _ in range(5)]
        await asyncio.sleep(1)
        assert len(sent) == 1
        gate.open_for_good()
        await asyncio.gather(*tasks)
        assert asyncio.get_running_loop().time() - started < 2

    virtual_time.run(main())


def test_a_limit_that_is_heard_while_many_wait_holds_for_them() -> None:
    async def main() -> None:
        gate, sent = Gate(10), []
        tasks = [asyncio.create_task(send(gate, 0, sent)) for _ in range(130)]
        await asyncio.sleep(0.05)
        gate.heard(Quotas(Quota(60, 50, 10), None), sent=asyncio.get_running_loop().time())
        await asyncio.gather(*tasks)
        assert sent[-1] - sent[0] == pytest.approx(120, rel=0.05)

    virtual_time.run(main())
