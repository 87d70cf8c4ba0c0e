"""What is done for a batch at its endpoint: submit it, follow it, bring its results here, end it.

Each call is made again while it may succeed, at most `patience_seconds`; what is raised ends the stage. The batch's
state is on the disk after each step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from anchored.errors import AnchoredError, ModelError, Stopped
from anchored.llm.batch_api import BatchApi, Look
from anchored.llm.batch_files import Batch, BatchFolder, count_lines
from anchored.llm.connection import Connection, backoff
from anchored.llm.faults import Fault
from anchored.llm.settings import BatchSettings, EndpointSettings
from anchored.progress import Progress

SETTLE_SECONDS = 10.0
"""Until a batch that was made is sure to be in the endpoint's list."""
FIRST_LOOK_SECONDS = 2.0
CANCEL_SECONDS = 60.0
"""How long a batch is tried to be cancelled at an endpoint that is down."""

Value = TypeVar("Value")


class _Gone(NamedTuple):
    """What a 404 says, and the way out of it."""

    what: str
    way_out: str


_NO_API = _Gone("has no Batch API", "leave out --batch, or see --batch-export")


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
        if state.file_id and state.base_url != self.base_url:
            raise ModelError(
                f"{batch.file}: this batch was sent to {state.base_url}, not {self.base_url}; give the old base_url "
                "back until it is collected, or delete the file to ask its requests again"
            )
        if state.batch_id:
            return True
        if state.file_id:
            if look := await self._find(batch):
                _note_made(batch, look)
                return True
            await self._raise_if_other_account(batch)
        batch.drop()
        return False

    async def has_ended(self, batch: Batch) -> bool:
        """Whether all is there that will come of it."""
        return (await self._look(batch)).ended

    async def submit(self, batch: Batch) -> None:
        """Upload its requests and make it."""
        batch.state.file_id = await self._patiently(lambda: self._api.upload(batch.requests), batch)
        batch.save()
        _note_made(batch, await self._patiently(lambda: self._make(batch), batch))

    async def collect(self, batch: Batch) -> Look:
        """Follow it to its end, and bring its results here."""
        await self._follow(batch)
        look = await self._patiently(lambda: self._bring(batch), batch, _unknown(batch))
        batch.state.status = look.status
        batch.state.collected = True
        batch.state.kept = not batch.was_run  # then there is nothing to keep
        batch.save()
        return look

    async def cancel(self, batch: Batch) -> Look | None:
        """How it is after it was cancelled, unless it had ended; None: none was made."""
        if not await self.was_made(batch):
            return None
        look = await self._look(batch)
        if not look.ended:
            look = await self._patiently(lambda: self._api.cancel(batch.state), batch, _unknown(batch))
        batch.state.status = look.status  # so that it is known who ended it
        batch.save()
        return look

    async def close(self) -> None:
        """Free the connections; idempotent."""
        if self._opened:
            await self._opened.connection.close()

    def no_money(self, fault: Fault) -> Stopped:
        """The account is empty."""
        return Stopped(self._api.connection.why_no_money(fault))

    def refused(self, fault: Fault) -> ModelError:
        """The endpoint takes no requests at all."""
        connection = self._api.connection
        return ModelError(connection.why_refused(connection.redacted(fault)))

    @property
    def _api(self) -> BatchApi:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    async def _make(self, batch: Batch) -> Look | Fault:
        """One attempt at making a batch. Where it is not known whether one was made, the endpoint is asked."""
        look = await self._api.make(batch.state)
        if isinstance(look, Fault) and look.follows == "again":
            return await self._find(batch) or look
        return look

    async def _find(self, batch: Batch) -> Look | None:
        """The batch that was made of its requests; None: there is none, though the list had its time to show it."""
        gone = _Gone(
            "lists no batches",
            f"look there whether one was made of {batch.state.file_id}, then delete {batch.file} to ask its requests "
            "again",
        )
        for seconds in (0.0, SETTLE_SECONDS):
            await asyncio.sleep(seconds)
            if look := await self._patiently(lambda: self._api.find(batch.state), batch, gone):
                return look
        return None

    async def _raise_if_other_account(self, batch: Batch) -> None:
        """A list without the batch tells nothing if the key's account is not the one that has the requests."""
        file_id = batch.state.file_id
        if not await self._patiently(lambda: self._api.knows_file(file_id), batch):
            raise ModelError(
                f"{self.where} knows no file {file_id}, and so not whether a batch was made of it; give back the key "
                f"that it was uploaded with, or delete {batch.file} to ask its requests again"
            )

    async def _bring(self, batch: Batch) -> Look | Fault:
        """One attempt at having all results here that the endpoint counts: some name the file after the end."""
        look = await self._api.look(batch.state)
        if isinstance(look, Fault):
            return look
        for file_id, path in ((look.output_file_id, batch.output), (look.error_file_id, batch.errors)):
            if file_id and (fault := await self._download(file_id, path, batch)):
                return fault
        # the failed are among the completed at some endpoints
        counted = [batch.output] if look.done + look.failed <= batch.state.requests else batch.results
        there = await asyncio.to_thread(lambda: sum(map(count_lines, counted)))
        if there < look.done:
            way_out = f"if it stays so, delete {batch.file} to ask its requests again"
            return Fault("again", f"it gives {there:,} of {look.done:,} replies of {batch.name}; {way_out}")
        return look

    async def _download(self, file_id: str, path: Path, batch: Batch) -> Fault | None:
        fault = await self._api.download(file_id, path)
        if fault and fault.status in (404, 405):
            raise ModelError(
                f"{self.where} does not have the results of {batch.name} ({fault.reason}); if the same command does "
                f"not find them either, delete {batch.file} to ask its requests again"
            )
        return fault

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
        return await self._patiently(lambda: self._api.look(batch.state), batch, _unknown(batch))

    async def _patiently(
        self, call: Callable[[], Awaitable[Value | Fault]], batch: Batch, gone: _Gone = _NO_API
    ) -> Value:
        """What a call gives, made again while it may succeed; `gone` is what a 404 means."""
        clock = asyncio.get_running_loop().time
        since, failures = 0.0, 0
        while isinstance(seen := await call(), Fault):
            failures += 1
            since = since or clock()
            if seen.follows == "quota":
                raise self.no_money(seen)
            if seen.follows in ("endpoint", "row", "without"):
                raise ModelError(self._why_not(seen, batch, gone))
            wait = backoff(failures) if seen.wait is None else seen.wait
            makes_room = seen.follows == "throttled" and self.busy > 1
            if clock() + wait - since > self._settings.patience_seconds and not makes_room:
                raise Stopped(f"{self.where} is down or not ready ({seen.reason}); the same command goes on later")
            await asyncio.sleep(wait)
        return seen

    def _why_not(self, fault: Fault, batch: Batch, gone: _Gone) -> str:
        if fault.status in (404, 405):
            return f"{self.where} {gone.what} ({fault.reason}); {gone.way_out}"
        if fault.status in (401, 403):
            return self._api.connection.why_refused(fault)
        if fault.status is None:  # its answer is not one of the Batch API's
            return f"{self.where} {fault.reason}; leave out --batch, and delete {batch.file} to ask its requests live"
        return f"{self.where} takes no such batch ({fault.reason})"


async def cancel_batches(folder: BatchFolder, asked: Mapping[str, EndpointSettings], progress: Progress) -> None:
    """End the batches that are under way; what they answered is collected when the stage goes on.

    `asked` are the endpoints of the recipe, by the fingerprint of their chats. Raises a ModelError that names the
    batches that could not be ended.
    """
    unfinished = [batch for batch in folder.batches() if batch.state.is_out]
    left = []
    for batch in unfinished:
        try:
            look = await _cancel(batch, asked.get(batch.state.fingerprint), progress)
        except AnchoredError as error:
            left.append(f"{_named(batch)} is not cancelled: {error}")
        else:
            progress.note(f"{_named(batch)}: {look.status if look else 'no batch was made of it'}")
    if left:
        raise ModelError("\n".join(left))
    if not unfinished:
        progress.note("no batch is under way")


async def _cancel(batch: Batch, settings: EndpointSettings | None, progress: Progress) -> Look | None:
    if settings is None:
        raise ModelError(f"the recipe asks no {batch.state.fingerprint} now; give its endpoint back")
    hasty = settings.model_copy(update={"patience_seconds": min(CANCEL_SECONDS, settings.patience_seconds)})
    endpoint = BatchEndpoint(hasty, BatchSettings(), lambda: BatchApi(Connection(hasty)), progress)
    try:
        return await endpoint.cancel(batch)
    finally:
        await endpoint.close()


def _named(batch: Batch) -> str:
    return f"{batch.name} ({batch.state.batch_id or 'uploaded'}, {batch.state.requests:,} requests)"


def _unknown(batch: Batch) -> _Gone:
    return _Gone(
        f"knows no batch {batch.state.batch_id}",
        f"give back the key that it was made with, or delete {batch.file} to ask its requests again",
    )


def _note_made(batch: Batch, look: Look) -> None:
    batch.state.batch_id, batch.state.status = look.batch_id, look.status
    batch.save()
