"""What came of a batch: read from its files, put in the store of replies, and counted at the batch price."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from itertools import islice

from anchored.llm.batch_files import Asked, Batch, Results
from anchored.llm.bodies import fingerprint
from anchored.llm.chat import Reply
from anchored.llm.faults import Fault
from anchored.llm.money import Purse, Spending, cost, worst_case
from anchored.llm.replies import Entry, ReplyStore
from anchored.llm.responses import read_reply
from anchored.llm.settings import EndpointSettings, Price
from anchored.llm.stops import stopped

ROWS_AT_ONCE = 256
_LACKING = Fault("again", "the results lack it")

Outcomes = Sequence[tuple[Asked, Reply | Fault]]
"""Requests with what came of them."""


class BatchResults:
    """The results of one model's batches. Money is counted where there is a price, and then there is a purse."""

    def __init__(self, settings: EndpointSettings, price: Price | None, store: ReplyStore, purse: Purse | None) -> None:
        self._model, self._fingerprint = settings.model, fingerprint(settings)
        self._price, self._store, self._purse = price, store, purse

    def worst_usd(self, batch: Batch) -> float:
        """The most that it can cost by today's price, which may be another than when it was sent."""
        return sum(self._worst_usd(asked) for asked in batch.asked()) if self._price else 0.0

    async def read(self, batch: Batch) -> AsyncGenerator[Outcomes]:
        """What came of its requests, some at a time."""
        with Results() as results:
            faults: dict[str, Fault] = {}
            for path in batch.results:
                faults |= (await asyncio.to_thread(results.add, path)).faults

            def outcome(asked: Asked) -> Reply | Fault:
                payload = results.find(asked.key)
                if payload is None:
                    return faults.get(asked.key, _LACKING)
                found = read_reply(payload, self._model, asked.request.max_tokens, 0.0)
                return stopped(found, asked.request.stop, asked.body)

            requests = batch.asked()
            while some := list(islice(requests, ROWS_AT_ONCE)):
                yield [(asked, outcome(asked)) for asked in some]
                await asyncio.sleep(0)

    async def keep(self, outcomes: Outcomes) -> None:
        """Its replies to the store, each with its price in the same transaction: counted once, however often."""
        entries, spendings = [], []
        for asked, found in outcomes:
            if isinstance(found, Reply) and asked.key not in self._store:
                entries.append(Entry(self._fingerprint, asked.request, found))
                if self._price:
                    spendings.append(cost(self._price, self._model, asked.body, found))
        await self._put(entries, spendings)

    def unsure_usd(self, outcomes: Outcomes) -> float:
        """The most that those without a reply can have cost, where the endpoint does not say that they cost nothing."""
        return sum(
            self._worst_usd(asked) for asked, found in outcomes if isinstance(found, Fault) and found.may_be_billed
        )

    async def spend_unsure(self, batch: Batch, usd: float) -> None:
        """Count its `unsure_usd`, once, however often this is called for it."""
        spending = Spending(self._model, usd, "unsure")
        if usd and await asyncio.to_thread(self._store.count_once, f"unsure of batch {batch.state.tag}", spending):
            self._note_spent(spending)

    def _worst_usd(self, asked: Asked) -> float:
        return worst_case(self._price, asked.body) if self._price else 0.0

    async def _put(self, entries: Sequence[Entry], spendings: Sequence[Spending]) -> None:
        await asyncio.to_thread(self._store.put, entries, spendings)
        for spending in spendings:
            self._note_spent(spending)

    def _note_spent(self, spending: Spending) -> None:
        assert self._purse
        self._purse.add(spending)
