"""Who makes which block on a cluster, as the hub sees it: with no Ray, and a clock of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from virtual_time import run as run_in_virtual_time

from anchored.create.ray_hub import SILENT_SECONDS, Closed, Event, Failed, Gone, RayHub, Ready, Told
from anchored.errors import Stopped


def at(tmp_path: Path, main: Callable[[RayHub], Awaitable[None]]) -> None:
    async def with_hub() -> None:
        hub = RayHub(tmp_path / "replies.sqlite")
        hub.keep_keys({"KEY": "sk-1"})
        await main(hub)
        await hub.close()

    run_in_virtual_time(with_hub())


def joined(hub: RayHub, actor: str, node: str = "node") -> str:
    found = hub.join(actor, node, 0)
    assert found is not None
    name, keys = found
    assert keys == {"KEY": "sk-1"}
    hub.ready(name)
    return name


async def events(hub: RayHub) -> list[Event]:
    return await asyncio.wait_for(hub.events(), 1)


def test_a_block_is_made_by_the_first_who_begins_it_and_by_nobody_once_it_is_done(tmp_path: Path) -> None:
    async def main(hub: RayHub) -> None:
        first, second = joined(hub, "a"), joined(hub, "b")
        hub.offer(0, 7, b"prompts")
        hub.offer(0, 7, b"prompts")
        assert await hub.next_blocks(0, "reader") == [(7, b"prompts"), (7, b"prompts")]
        assert hub.begins(first, 7)
        assert not hub.begins(second, 7)
        hub.done(7)
        assert not hub.begins(second, 7)
        assert not hub.begins(first, 8), "which nobody has offered"

    at(tmp_path, main)


@pytest.mark.parametrize("how", ["its process ended", "its node is gone", "nothing was heard of it for 30 s"])
def test_what_a_lost_worker_had_begun_is_named_and_may_be_begun_by_others(tmp_path: Path, how: str) -> None:
    async def main(hub: RayHub) -> None:
        lost, other = joined(hub, "a", "node 1"), joined(hub, "b", "node 2")
        for number in range(4):
            hub.offer(0, number, b"")
        assert [hub.begins(worker, number) for worker, number in ((lost, 0), (other, 1), (lost, 2))] == [True] * 3
        assert await events(hub) == [Ready(lost, "node 1", 0), Ready(other, "node 2", 0)]
        if how == "its process ended":
            assert joined(hub, "a", "node 1") not in (lost, other)
        elif how == "its node is gone":
            hub.watch({"node 2"})
        else:
            for _ in range(4):
                await asyncio.sleep(SILENT_SECONDS / 3)
                assert hub.beat(other)
                hub.watch({"node 1", "node 2"})
        assert (await events(hub))[0] == Gone(lost, how, begun=(0, 2), waiting=(3,))
        assert not hub.beat(lost)
        assert not hub.begins(lost, 3)
        assert hub.begins(other, 0)
        assert not hub.begins(other, 1), "which it is making"
        with pytest.raises(Stopped, match="was out of reach"):
            await hub.say(lost, [])

    at(tmp_path, main)


def test_what_the_source_waits_for_comes_when_it_is_offered_and_ends_with_the_run(tmp_path: Path) -> None:
    async def main(hub: RayHub) -> None:
        waiting = asyncio.create_task(hub.next_blocks(1, "reader"))
        await asyncio.sleep(1)
        assert not waiting.done()
        hub.offer(0, 1, b"of another crew")
        hub.offer(1, 2, b"own")
        assert await waiting == [(2, b"own")]
        waiting = asyncio.create_task(hub.next_blocks(1, "reader"))
        await asyncio.sleep(1)
        hub.end()
        assert await waiting is None

    at(tmp_path, main)


def test_a_source_that_was_started_again_is_told_of_as_it_would_lose_what_the_first_one_took(tmp_path: Path) -> None:
    async def main(hub: RayHub) -> None:
        hub.offer(0, 1, b"")
        assert await hub.next_blocks(0, "reader")
        assert await hub.next_blocks(0, "another") is None
        (failed,) = await events(hub)
        assert isinstance(failed, Failed)
        assert "the same command goes on" in str(failed.error)

    at(tmp_path, main)


def test_workers_close_when_they_are_told_and_none_joins_then(tmp_path: Path) -> None:
    async def main(hub: RayHub) -> None:
        worker = joined(hub, "a")
        hub.tell(worker, "the server is slow")
        closing = asyncio.create_task(hub.closing())
        hub.close_workers()
        await closing
        hub.closed(worker)
        assert hub.beat(worker), "it is to leave its process to Ray"
        hub.watch(set())
        assert hub.join("b", "node", 0) is None
        assert await events(hub) == [Ready(worker, "node", 0), Told(worker, "the server is slow"), Closed(worker)]

    at(tmp_path, main)
