"""How rows are made of prompts: the one function that makes a row, and the engine that makes many in this process.

Other engines (`on_ray`) make the same rows by the same function elsewhere.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from anchored.create.clair import clair
from anchored.create.desk import Bill, Desk
from anchored.create.filters import filtered
from anchored.create.judge import judge_off_policy, judge_on_policy
from anchored.create.noticed import noticed
from anchored.create.row_file import RowFile
from anchored.create.stronger import stronger_preferred
from anchored.llm.ask import AHEAD, OUTSTANDING, work_in_order
from anchored.records import Outcome, Pair, Prompt

METHODS: Mapping[str, Callable[[Prompt, Desk], Awaitable[Pair]]] = {
    "clair": clair,
    "judge-on-policy": judge_on_policy,
    "judge-off-policy": judge_off_policy,
    "stronger-preferred": stronger_preferred,
}


@dataclass(frozen=True, slots=True)
class Made:
    """A row, and what it took."""

    pair: Pair
    bill: Bill


async def make_row(prompt: Prompt, desk: Desk) -> Made:
    """A row of a prompt, from its sample to its outcome."""
    with desk.bill() as bill:
        pair = filtered(await METHODS[desk.settings.method](prompt, desk), desk.filters)
    if pair.outcome is Outcome.OK:
        seen = noticed(pair, desk.shown_to_judge(pair))
        bill.noticed.extend(seen)
        pair = replace(pair, detail="; ".join(filter(None, (pair.detail, *seen.values()))))
    return Made(pair, bill)


Job = tuple[RowFile, Prompt]
"""A prompt, and where its row is to stand."""


class Engine(Protocol):
    """Makes many rows at once."""

    async def rows(
        self, jobs: Iterable[Job], finish: Callable[[RowFile, Made], Pair], take: Callable[[RowFile, Pair], None]
    ) -> None:
        """A row of each prompt: `finish` gets it when it is made, and `take` what that returned, in the jobs' order.

        Jobs are drawn as they are worked on. What ends the stage (ModelError, Stopped) is raised when what was under
        way has ended.
        """
        ...


@dataclass(frozen=True, slots=True)
class ByBatch:
    """How rows are made where replies come by batches; no round of them is made that could be spared."""

    rows: int
    """At a time."""
    halt: Callable[[], None]
    """Called when the stage has failed: nothing more is to be submitted."""


class Here:
    """Makes rows in this process."""

    def __init__(self, desk: Desk, by_batch: ByBatch | None = None) -> None:
        self._desk = desk
        self._way = by_batch or ByBatch(OUTSTANDING, lambda: None)

    async def rows(
        self, jobs: Iterable[Job], finish: Callable[[RowFile, Made], Pair], take: Callable[[RowFile, Pair], None]
    ) -> None:
        async def row(_: int, job: Job) -> tuple[RowFile, Pair]:
            file, prompt = job
            return file, finish(file, await make_row(prompt, self._desk))

        way = self._way
        await work_in_order(
            jobs,
            row,
            lambda done: take(*done),
            outstanding=way.rows,
            ahead=max(AHEAD, 2 * way.rows),
            on_failure=way.halt,
        )
