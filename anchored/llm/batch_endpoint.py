"""What is done for a batch at its endpoint: submit it, follow it, bring its results here, end it.

Each call is made again while it may succeed, at most `patience_seconds`; what is raised ends the stage. The batch's
state is on the disk after each step.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

from anchored.errors import ModelError, Stopped
from anchored.llm.batch_api import BatchApi, Look
from anchored.llm.batch_files import Batch, BatchFolder, State
from anchored.llm.connection import Connection
from anchored.llm.faults import Fault
from anchored.llm.settings import BatchSettings, EndpointSettings
from anchored.progress import Progress

SETTLE_SECONDS = 5.0
"""Until a batch that was made is sure to be in the endpoint's list."""
FIRST_LOOK_SECONDS = 2.0
LONGEST_BACKOFF = 60.0

Value = TypeVar("Value")


class BatchEndpoint:
    """The batches of one endpoint."""

    def __init__(
        self, settings: EndpointSettings, how: BatchSettings, api: Callable[[], BatchApi], progress: Progress
    ) -> None:
        self.busy = 0
        """How many batches are in work here: the ends of others make room for one that is too much."""
        self._settings, self._how, self._open, self._progress = settings, how, api, progress
        self._opened: BatchApi | None = None

    @property
    def base_url(self) -> str:
        """The endpoint's address."""
        return self._api.connection.base_url

    @property
    def where(self) -> str:
        """The model and its address, for people."""
        return self._api.connection.where

    async def was_made(self, batch: Batch) -> bool:
        """Whether the endpoint has the batch; one that was never made is dropped: nobody may want it now."""
        state = batch.state
        if not state.file_id:
            batch.drop()
            return False
        if state.base_url != self.base_url:
            raise ModelError(
                f"{batch.file}: this batch was sent to {state.base_url}, not {self.base_url}; give the old base_url "
                "back until it is collected, or delete the file to ask its requests again"
            )
        if state.batch_id:
            return True
        await asyncio.sleep(SETTLE_SECONDS)
        look = await self._patiently(lambda: self._api.find(state))
        if look is None:
            batch.drop()
            return False
        _note_made(batch, look)
        return True

    async def has_ended(self, batch: Batch) -> bool:
        """Whether all is there that will come of it."""
        return (await self._look(batch)).ended

    async def submit(self, batch: Batch) -> None:
        """Upload its requests and make it."""
        state = batch.state
        state.file_id = await self._patiently(lambda: self._api.upload(batch.requests))
        batch.save()
        _note_made(batch, await self._patiently(lambda: self._make(state)))

    async def collect(self, batch: Batch) -> Look:
        """Follow it to its end, and bring its results here."""
        look = await self._follow(batch)
        for file_id, path in ((look.output_file_id, batch.output), (look.error_file_id, batch.errors)):
            if file_id:
                await self._patiently(lambda file_id=file_id, path=path: self._api.download(file_id, path))
        batch.state.status = look.status
        batch.state.collected = True
        batch.state.kept = look.status == "failed"  # then there is nothing to keep
        batch.save()
        return look

    async def close(self) -> None:
        """Free the connections; idempotent."""
        if self._opened:
            await self._opened.connection.close()

    def no_money(self, fault: Fault) -> Stopped:
        """The account is empty."""
        return Stopped(
            f"no money is left at {self.where} ({fault.reason}); top up the account, then the same command goes on"
        )

    def refused(self, fault: Fault) -> ModelError:
        """The endpoint takes no requests at all."""
        connection = self._api.connection
        return ModelError(connection.why_refused(connection.redacted(fault)))

    @property
    def _api(self) -> BatchApi:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    async def _make(self, state: State) -> Look | Fault:
        """One attempt at making a batch. Where it is not known whether one was made, the endpoint is asked."""
        look = await self._api.make(state)
        if isinstance(look, Fault) and look.follows == "again":
            await asyncio.sleep(SETTLE_SECONDS)
            return await self._patiently(lambda: self._api.find(state)) or look
        return look

    async def _follow(self, batch: Batch) -> Look:
        progress, state = self._progress, batch.state
        wait, done = min(FIRST_LOOK_SECONDS, self._how.poll_seconds), 0
        progress.note(f"{batch.name}: {state.requests:,} requests are under way as {state.batch_id}")
        progress.start(batch.name, state.requests)
        try:
            while True:
                look = await self._look(batch)
                progress.advance(batch.name, look.done + look.failed - done, status=look.status, failed=look.failed)
                done = look.done + look.failed
                if look.ended:
                    return look
                await asyncio.sleep(wait)
                wait = min(1.5 * wait, self._how.poll_seconds)
        finally:
            progress.finish(batch.name)

    async def _look(self, batch: Batch) -> Look:
        return await self._patiently(lambda: self._api.look(batch.state), unknown=batch)

    async def _patiently(self, call: Callable[[], Awaitable[Value | Fault]], unknown: Batch | None = None) -> Value:
        """What a call gives, made again while it may succeed; `unknown` is the batch that a 404 speaks of."""
        clock = asyncio.get_running_loop().time
        since, failures = clock(), 0
        while isinstance(seen := await call(), Fault):
            failures += 1
            if seen.follows == "quota":
                raise self.no_money(seen)
            if seen.follows in ("endpoint", "row", "without"):
                raise ModelError(self._why_not(seen, unknown))
            wait = _backoff(failures) if seen.wait is None else seen.wait
            makes_room = seen.follows == "throttled" and self.busy > 1
            if clock() + wait - since > self._settings.patience_seconds and not makes_room:
                raise Stopped(
                    f"{self.where} is down or takes no batches ({seen.reason}); the same command goes on later"
                )
            await asyncio.sleep(wait)
        return seen

    def _why_not(self, fault: Fault, unknown: Batch | None) -> str:
        if fault.status == 404 and unknown:
            return (
                f"{self.where} knows no batch {unknown.state.batch_id} ({fault.reason}); give back the key that it was "
                f"made with, or delete {unknown.file} to ask its requests again"
            )
        if fault.status in (404, 405):
            return f"{self.where} has no Batch API ({fault.reason}); leave out --batch, or see --batch-export"
        if fault.status in (401, 403):
            return self._api.connection.why_refused(fault)
        return f"{self.where} takes no such batch ({fault.reason})"


async def cancel_batches(folder: BatchFolder, asked: Mapping[str, EndpointSettings], progress: Progress) -> None:
    """End the batches that are under way; what they answered is collected when the stage goes on.

    `asked` are the endpoints of the recipe, by the fingerprint of their chats. Raises a ModelError that names the
    batches that could not be ended.
    """
    unfinished = [batch for batch in folder.batches() if batch.state.is_out]
    left = []
    for batch in unfinished:
        came = await _cancel(batch, asked.get(batch.state.fingerprint))
        named = f"{batch.name} ({batch.state.batch_id or 'uploaded'}, {batch.state.requests:,} requests)"
        if isinstance(came, Fault):
            left.append(f"{named} is not cancelled: {came.reason}")
        else:
            progress.note(f"{named}: {came.status if came else 'no batch was made of it'}")
    if left:
        raise ModelError("\n".join(left))
    if not unfinished:
        progress.note("no batch is under way")


async def _cancel(batch: Batch, settings: EndpointSettings | None) -> Look | Fault | None:
    """How the batch is after it was cancelled, unless it had ended; None: there is none."""
    state = batch.state
    if settings is None:
        return Fault("row", f"the recipe asks no {state.fingerprint} now; give its endpoint back")
    connection = Connection(settings)
    try:
        if connection.base_url != state.base_url:
            return Fault("row", f"it was sent to {state.base_url}; give that base_url back")
        api = BatchApi(connection)
        look = await (api.look(state) if state.batch_id else api.find(state))
        if look is None:
            batch.drop()
            return None
        if isinstance(look, Look):
            state.batch_id = look.batch_id
            if not look.ended:
                look = await api.cancel(state)
        if isinstance(look, Look):
            state.status = look.status  # so that it is known who ended it
            batch.save()
        return look
    finally:
        await connection.close()


def _backoff(failures: int) -> float:
    return random.uniform(0.5, 1) * min(LONGEST_BACKOFF, 2.0 ** (failures - 1))


def _note_made(batch: Batch, look: Look) -> None:
    batch.state.batch_id, batch.state.status = look.batch_id, look.status
    batch.save()
