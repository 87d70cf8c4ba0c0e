"""A chat that asks by batches: requests gather, go out together, and are answered when their batch has ended.

It has the name and the fingerprint of the live chat with the same settings, so the store of replies, which must stand
before it, is one: a run may begin in batches and end live, or the other way round. Whatever the way, what is under way
at the endpoint is not asked again. A batch goes through these steps, each on the disk before the next: requests and
intent written, file uploaded, batch made, results downloaded, replies in the store with their price, whether anybody
asks for them now or not.
"""

from __future__ import annotations

import asyncio
import logging
import shlex
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from anchored.errors import AnchoredError, DataError, ModelError, Stopped
from anchored.llm.batch_api import BatchApi, Look
from anchored.llm.batch_endpoint import BatchEndpoint
from anchored.llm.batch_files import Asked, Batch, BatchFolder, Counted, Results, State, keys_of, request_line
from anchored.llm.batch_mishaps import Mishaps
from anchored.llm.batch_queue import Queue, Row
from anchored.llm.batch_results import BatchResults
from anchored.llm.bodies import fingerprint, request_body
from anchored.llm.chat import Reply, Request
from anchored.llm.endpoints import Endpoints
from anchored.llm.faults import Fault
from anchored.llm.money import Purse, cost, dollars, worst_case
from anchored.llm.openai_chat import OpenAIChat
from anchored.llm.replies import ReplyStore, request_key
from anchored.llm.responses import read_reply
from anchored.llm.settings import BatchSettings, EndpointSettings
from anchored.llm.stops import stopped
from anchored.progress import Progress

Way = Literal[
    "submit",  # by the endpoint's Batch API
    "export",  # to files for somebody else to run
    "live",  # one by one; only what is in batches already comes from there
]

TURNS = 8
"""Of the event loop, more than lie between two requests that are asked one after the other."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Means:
    """What a `BatchChat` works with."""

    folder: BatchFolder
    store: ReplyStore
    api: Callable[[], BatchApi]
    """Opened when it is needed: files can be written and read without an endpoint."""
    live: Callable[[], OpenAIChat | Endpoints]
    """Asked for what is in no batch, where `way` is live."""
    progress: Progress
    busy: Callable[[], bool] = lambda: False
    """Whether somebody is at work whose result may be asked about next."""
    purse: Purse | None = None
    imports: Sequence[Path] = ()
    """Files of results that came from elsewhere."""
    together: Sequence[BatchChat] = ()
    """The chats of a stage that asks several models: what ends one ends all, what they export is exported at once."""


class BatchChat:
    """Answers from batches: made here and now, or by earlier processes, or run by somebody else."""

    def __init__(self, settings: EndpointSettings, how: BatchSettings, way: Way, means: Means) -> None:
        self.name = settings.model
        self.fingerprint = fingerprint(settings)
        self._settings, self._how, self._way, self._means = settings, how, way, means
        self._price = how.price(settings.price) if means.purse else None
        self._purse = means.purse if self._price else None
        self._results = BatchResults(settings, self._price, means.store, self._purse)
        self._endpoint = BatchEndpoint(settings, how, means.api, means.progress)
        self._imported = Results()
        self._mishaps = Mishaps(self.name, how.retries if way == "submit" else None)
        self._batches: list[Batch] = []
        self._open: set[str] = set()
        """Keys in batches of earlier processes whose replies are not in the store yet."""
        self._rows: dict[str, Row] = {}
        self._queue = Queue()
        """Of the rows, those in no batch."""
        self._refused: set[str] = set()
        self._most_rows = how.requests
        self._not_before = 0.0
        self._short_of_money = self._crowded = False
        """Nothing goes out until a batch has ended; until one has ended well."""
        self._wake = asyncio.Event()
        self._files = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sender: asyncio.Task[None] | None = None
        self._loading: asyncio.Task[None] | None = None
        self._over: Exception | None = None
        self._opened_live: OpenAIChat | Endpoints | None = None
        self._complete = self._closed = False

    async def reply(self, request: Request) -> Reply:
        await self.begin()
        key = request_key(self.fingerprint, request)
        if known := self._find_imported(key, request):
            return known
        self._raise_if_hopeless(key)
        if self._way == "live" and key not in self._open:
            return await self._live().reply(request)
        answer = await self._answer_of(self._rows.get(key) or self._new_row(key, request))
        return await self._live().reply(request) if answer is None else answer

    async def begin(self) -> None:
        """Take up what earlier processes and others left; to be called before the store is looked into. Idempotent."""
        if self._loading is None:
            self._loading = asyncio.create_task(self._guarded(self._load()))
        await asyncio.shield(self._loading)
        self._raise_if_over()

    async def check(self) -> None:
        """A ModelError now, instead of after hours of other work, if the endpoint cannot be used. Free."""
        await self.begin()
        if self._way != "export":
            await self._live().check()

    async def complete(self) -> None:
        """The stage that asked has all it wants; returns when what was downloaded is in the store."""
        self._complete = True
        async with self._files:
            pass

    def halt(self) -> None:
        """The stage has failed elsewhere: nothing more goes out, and nobody waits for what is out."""
        self._stop(Stopped("the stage was ended by something else; the same command goes on"))

    async def close(self) -> None:
        """Stop following; what is under way at the endpoint goes on there. Idempotent."""
        if self._closed:
            return
        self._closed = True
        tasks = [task for task in (*self._tasks, self._sender, self._loading) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tell_what_goes_on()
        self._imported.close()
        await self._endpoint.close()
        if self._opened_live:
            await self._opened_live.close()

    def _tell_what_goes_on(self) -> None:
        left = [batch for batch in self._batches if batch.state.is_out and batch.state.batch_id]
        if not left:
            return
        count = sum(batch.state.requests for batch in left)
        go_on, them = ("1 batch goes on", "it") if len(left) == 1 else (f"{len(left)} batches go on", "them")
        ending = self._means.folder.ending
        then = f"the same command collects {them}, and {ending} ends {them}"
        if self._complete:
            then = f"nothing asks for {them} now; {ending} ends {them}, --redo create collects {them}"
        self._means.progress.note(f"{go_on} at {self._endpoint.where} ({count:,} requests); {then}")

    # what is known already

    async def _load(self) -> None:
        unfinished = []
        for batch in self._means.folder.batches():
            if batch.state.fingerprint != self.fingerprint:
                continue
            if not batch.state.kept:
                unfinished.append(batch)
                continue
            self._batches.append(batch)
            if not batch.state.used and batch.state.status != "cancelled" and batch.was_run:
                await self._recall(batch)
        self._import()
        if self._way == "export" and (out := [batch for batch in unfinished if batch.state.is_out]):
            raise DataError(
                f"{out[0].file}: this batch is under way; collect it with --batch, or end it with "
                f"{self._means.folder.ending}, before what is left is exported"
            )
        for batch in unfinished:
            if batch.state.collected or await self._endpoint.was_made(batch):
                self._batches.append(batch)
                if batch.state.collected or await self._endpoint.has_ended(batch):
                    await self._go_on(batch)  # before anything is asked that its replies may answer too
                else:
                    self._open.update(keys_of(batch.requests))
                    self._start(self._go_on(batch), await asyncio.to_thread(self._results.worst_usd, batch))
        self._sender = asyncio.create_task(self._guarded(self._send_all()))

    async def _recall(self, batch: Batch) -> None:
        """Note again which of its requests got no reply, for they are not to be asked without end."""
        async with aclosing(self._results.read(batch)) as parts:
            async for outcomes in parts:
                for asked, found in outcomes:
                    if isinstance(found, Fault):
                        self._mishaps.note(asked.key, found)

    def _import(self) -> None:
        """Index what was run elsewhere, and say what is in it."""
        if not self._means.imports:
            return
        folder = self._means.folder
        asked = {bytes.fromhex(key) for path in folder.requests() for key in keys_of(path)}
        for path in self._means.imports:
            found = self._imported.add(path, lambda key: bytes.fromhex(key) in asked or key in self._means.store)
            for key, fault in found.faults.items():  # it may be another model's: heard of when the row is asked
                self._mishaps.note(key, fault)
            if folder.is_new(path):
                self._means.progress.note(_told(path, found))
            if not (found.replies or found.faults):  # what it lacks would be asked live, and paid for
                raise DataError(f"{path}: holds no result of this run's requests; name what came of its export")

    def _raise_if_hopeless(self, key: str) -> None:
        """A request that batches refused, or failed at too often, is not asked again before the stage is complete."""
        last = self._mishaps.last(key)
        if last and last.follows == "without":
            self._leave_out(last.parameter)
        elif error := self._mishaps.why_given_up(key):
            raise error

    def _find_imported(self, key: str, request: Request) -> Reply | None:
        """The reply that was imported, which is spent money from now on."""
        payload = self._imported.find(key)
        if payload is None:
            return None
        body = request_body(self._settings, request, self._refused)
        reply = stopped(read_reply(payload, self.name, request.max_tokens, 0.0), request.stop, body)
        if isinstance(reply, Fault):
            self._imported.forget(key)
            return None
        if self._purse and self._price:
            self._purse.spend(cost(self._price, self.name, body, reply))
        return reply

    # rows that wait

    def _new_row(self, key: str, request: Request) -> Row:
        body = request_body(self._settings, request, self._refused)
        usd = worst_case(self._price, body) if self._price else 0.0
        row = Row(key, request, len(request_line(key, body)), usd, asyncio.get_running_loop().create_future())
        self._rows[key] = row
        if key not in self._open:
            self._enqueue(row)
        return row

    def _enqueue(self, row: Row) -> None:
        self._queue.put(row)
        self._wake.set()

    async def _answer_of(self, row: Row) -> Reply | None:
        row.waiting += 1
        try:
            return await asyncio.shield(row.answer)
        finally:
            row.waiting -= 1
            if not row.waiting:  # answered, or nobody wants it any more
                self._queue.drop(row)
                self._rows.pop(row.key, None)

    async def _send_all(self) -> None:
        while True:
            self._wake.clear()
            wait = self._seconds_until_due()
            if wait is None or wait > 0:
                with suppress(TimeoutError):  # not `wait_for`, which may let a cancellation pass unheard
                    async with asyncio.timeout(wait):
                        await self._wake.wait()
                for _ in range(TURNS):  # where the loop was held up, those who are about to ask come first
                    await asyncio.sleep(0)
            elif self._way == "export":
                self._export()
            else:
                await self._send()

    def _seconds_until_due(self) -> float | None:
        """Until what has gathered is sent; None: until something else happens."""
        if not self._queue or self._short_of_money or self._crowded:
            return None
        now = asyncio.get_running_loop().time()
        full = len(self._queue) >= self._most_rows or self._queue.size >= self._most_bytes
        if full and self._way == "submit":
            return self._not_before - now
        if self._means.busy():
            return self._how.linger_seconds
        return max(self._queue.asked_at + self._how.linger_seconds, self._not_before) - now

    @property
    def _most_bytes(self) -> float:
        return self._how.megabytes * 1e6

    def _cut(self, affords: Callable[[float], bool] = lambda _: True) -> list[Row]:
        """The first rows in the queue that a batch can hold."""
        return self._queue.cut(self._most_rows, self._most_bytes, affords)

    async def _send(self) -> None:
        if rows := self._cut(self._purse.has) if self._purse else self._cut():
            self._start(self._make(rows), sum(row.usd for row in rows))
        elif self._tasks:  # what they do not spend may be enough
            self._short_of_money = True
        elif self._purse:  # likewise what others do not spend; if nobody is left, this raises
            async with self._purse.reserved(self.name, self._queue.first.usd) as reservation:
                reservation.release()

    def _export(self) -> None:
        chats = [chat for chat in self._means.together or (self,) if chat._queue]
        count = sum(len(chat._queue) for chat in chats)
        written = [(chat.name, chat._written()) for chat in chats]
        name, (first, *_) = written[0]
        where = ", ".join(_between(paths) + (f" ({name})" if len(written) > 1 else "") for name, paths in written)
        results = str(first.with_name(f"{first.stem}.output.jsonl"))
        command = shlex.join(("vllm", "run-batch", "-i", str(first), "-o", results, "--model", name))
        self._stop_all(
            Stopped(
                f"{count:,} requests are in {where}; run them, as with `{command}`, and go on with "
                f"--batch-import {shlex.quote(results)} in place of --batch-export"
            )
        )

    def _written(self) -> list[Path]:
        """Files of all that is in the queue."""
        cuts = iter(self._cut, [])
        return self._means.folder.export(self._asked(rows) for rows in cuts)

    def _asked(self, rows: Iterable[Row]) -> Iterator[Asked]:
        for row in rows:
            row.left_out = frozenset(self._refused)
            yield Asked(row.key, row.request, request_body(self._settings, row.request, row.left_out))

    # batches under way

    def _start(self, work: Awaitable[None], usd: float) -> None:
        """Do something for a batch that may cost so much, which stays set aside until its rows are answered."""
        held = ExitStack()
        if self._purse:
            held.enter_context(self._purse.held(usd))

        async def do() -> None:
            with held:
                await self._guarded(work)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._short_of_money = False
            self._endpoint.busy = len(self._tasks)
            self._crowded &= bool(self._tasks)
            self._wake.set()

        task = asyncio.create_task(do())
        self._tasks.add(task)
        self._endpoint.busy = len(self._tasks)
        task.add_done_callback(ended)

    async def _make(self, rows: Sequence[Row]) -> None:
        state = State(self._endpoint.base_url, self.fingerprint, len(rows), sum(row.usd for row in rows))
        async with self._files:
            batch = await asyncio.to_thread(self._means.folder.begin, self._asked(rows), state)
        self._batches.append(batch)
        self._tell_what_is_sent(batch)
        self._raise_if_over()
        await self._endpoint.submit(batch)
        await self._go_on(batch)

    def _tell_what_is_sent(self, batch: Batch) -> None:
        """How many requests, and what they can cost, before they go."""
        usd = f", for {dollars(batch.state.usd)} at most" if self._purse else ""
        if self._purse and self._queue and not self._purse.has(self._queue.first.usd):
            usd += f"; {len(self._queue):,} more wait, create.budget_usd has no room for them at their worst case"
        self._means.progress.note(f"{batch.name}: {batch.state.requests:,} requests go to {self._endpoint.where}{usd}")

    async def _go_on(self, batch: Batch) -> None:
        """Follow a batch to its end and answer its rows."""
        state = batch.state
        ended_by_others = False
        if not state.collected:
            asked_to_end = state.status.startswith("cancel")
            look = await self._endpoint.collect(batch)
            if not batch.was_run:
                self._note_failed(batch, look)
                return
            if look.status == "failed":
                log.warning("%s failed half way (%s); what it answered is kept", batch.name, look.errors)
            ended_by_others = look.status == "cancelled" and not asked_to_end
        self._crowded, self._most_rows = False, min(self._how.requests, 2 * self._most_rows)
        self._wake.set()
        await self._keep(batch, ended_by_others)

    async def _keep(self, batch: Batch, ended_by_others: bool) -> None:
        """Its replies to the store, and its rows are answered."""
        end: AnchoredError | None = None
        unsure_usd = 0.0
        async with self._files, aclosing(self._results.read(batch)) as parts:
            async for outcomes in parts:
                await self._results.keep(outcomes)
                unsure_usd += self._results.unsure_usd(outcomes)
                for asked, found in outcomes:
                    if isinstance(found, Fault) and asked.key in self._rows:
                        end = end or self._end_by(found, batch if ended_by_others else None)
                    if end is None or isinstance(found, Reply):
                        self._settle(asked.key, found)
            await self._results.spend_unsure(batch, unsure_usd)
            batch.state.kept = True
            batch.save()
        if end:
            raise end

    def _end_by(self, fault: Fault, cancelled: Batch | None) -> AnchoredError | None:
        """What ends the stage when a row that waits got no reply; whoever cancels a batch wants no other instead."""
        if fault.follows == "quota":
            return self._endpoint.no_money(fault)
        if fault.follows == "endpoint":
            return self._endpoint.refused(fault)
        if cancelled and self._way == "submit":
            return Stopped(
                f"{cancelled.name} ({cancelled.state.batch_id}) was cancelled at {self._endpoint.where}; what it "
                "answered is kept, and the same command asks the rest by another batch, or live without --batch"
            )
        return None

    def _note_failed(self, batch: Batch, look: Look) -> None:
        """Nothing of it was run: for its size, and then less goes out later; or for what is in it, which ends all."""
        where = self._endpoint.where
        if not look.limited:
            raise ModelError(f"{where} takes no such batch ({look.errors}); {batch.requests} is what was sent")
        keys = list(keys_of(batch.requests))
        self._open.difference_update(keys)  # who has not asked for them yet does so as for any others
        others = len(self._tasks) > 1
        if batch.state.requests == 1 and not others and self._way == "submit":
            raise Stopped(f"{where} takes no batch now ({look.errors}); the same command goes on later")
        log.warning("%s has too much under way (%s); fewer requests go out later", where, look.errors)
        self._most_rows = max(1, min(self._most_rows, batch.state.requests) // 2)
        self._crowded = others
        self._not_before = asyncio.get_running_loop().time() + self._how.poll_seconds
        for key in keys:
            if key in self._rows:
                self._again(self._rows[key])

    def _settle(self, key: str, found: Reply | Fault) -> None:
        """Answer the row of a batch that has ended, should it wait."""
        self._open.discard(key)
        if isinstance(found, Fault):
            self._mishaps.note(key, found)
        row = self._rows.get(key)
        if row is None or row.answer.done():
            return
        if isinstance(found, Reply):
            row.answer.set_result(found)
        else:
            self._settle_fault(row, found)

    def _settle_fault(self, row: Row, fault: Fault) -> None:
        if fault.follows == "without" and fault.parameter not in row.left_out:
            self._leave_out(fault.parameter)
            self._again(row)
        elif fault.follows == "without":
            _fail(row, self._mishaps.refusal(fault))
        elif error := self._mishaps.why_given_up(row.key):
            _fail(row, error)
        else:
            self._again(row)

    def _again(self, row: Row) -> None:
        if row.answer.done():
            return
        if self._way == "submit":
            self._enqueue(row)
        else:
            row.answer.set_result(None)

    def _leave_out(self, parameter: str) -> None:
        if parameter not in self._refused:
            self._refused.add(parameter)
            log.warning("%s refuses %s: the requests go again without", self.name, parameter)

    def _live(self) -> OpenAIChat | Endpoints:
        if self._opened_live is None:
            self._opened_live = self._means.live()
        return self._opened_live

    # the end

    async def _guarded(self, work: Awaitable[None]) -> None:
        try:
            await work
        except Exception as error:
            self._stop_all(error)

    def _stop_all(self, error: Exception) -> None:
        """The stage is over, for one model alone does not complete it; what is under way is safe at the endpoint."""
        for chat in {self, *self._means.together}:
            chat._stop(error)

    def _stop(self, error: Exception) -> None:
        """Whoever waits gets the error, and so does whoever asks."""
        if self._over is not None:
            return
        self._over = error
        self._queue.clear()
        for row in list(self._rows.values()):
            _fail(row, _copy(error))

    def _raise_if_over(self) -> None:
        if self._over is not None:
            raise _copy(self._over)


def _fail(row: Row, error: Exception) -> None:
    if not row.answer.done():
        row.answer.set_exception(error)
        row.answer.exception()  # whoever waited may be gone


def _copy(error: Exception) -> Exception:
    """The same error, without the traceback of where it was raised before."""
    return type(error)(*error.args) if isinstance(error, AnchoredError) else error


def _between(paths: Sequence[Path]) -> str:
    return f"{paths[0]} to {paths[-1].name}" if len(paths) > 1 else str(paths[0])


def _told(path: Path, found: Counted) -> str:
    parts = [f"{found.replies:,} replies"]
    if found.faults:
        first = next(iter(found.faults.values()))
        parts.append(f"{len(found.faults):,} requests without one (the first: {first.reason})")
    if found.foreign:
        parts.append(f"{found.foreign:,} results of requests that are not this run's")
    if found.unreadable:
        one = found.unreadable == 1
        parts.append("1 line that is no result" if one else f"{found.unreadable:,} lines that are no results")
    return f"{path}: {', '.join(parts)}"
