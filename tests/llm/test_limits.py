from __future__ import annotations

import asyncio

import pytest

from anchored.llm.limits import Gate, Slot


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

    asyncio.run(main())


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
        async with asyncio.timeout(1), gate.slot():
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
