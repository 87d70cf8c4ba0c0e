"""Limits, money and replies of one run that many processes share: a `Hub` in one of them, stand-ins in the others.

Each worker has a `Line` to the hub, over which its `SharedGate`s, its `SharedPurse` and its `SharedReplies` ask. The
hub decides with the same gates, purse and store that a run in one process has, so their totals hold however many
workers there are. It knows what each worker holds: when one is gone, its slots are free again, what it had set aside is
spent (its requests may have been billed), and it is refused should it only have been out of reach.

A reply is in the hub's store before the worker that asked for it gets on, so a worker that ends takes no more with it
than the requests it had in flight. It is in a store on the worker's node before it leaves for the hub, so what the hub
cannot keep (its disk is full, or it is gone) is there still, and is merged into the hub's store in the end, or when the
run goes on (`hand_over`). How a line reaches the hub is not known here.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from anchored.errors import AnchoredError, DataError, Stopped
from anchored.llm.chat import Chat, Reply, Request
from anchored.llm.limits import Gate, Limits, Slot, gate_of
from anchored.llm.money import Purse, Reservation, Reserves, Spending, Spent
from anchored.llm.rates import Quotas
from anchored.llm.replies import Entry, Remembered, Replies, ReplyStore, StoredRow, stored_row
from anchored.llm.settings import EndpointSettings
from anchored.records import content_hash

_WAIT = ("enter", "renew", "reserve", "keep")
"""What is not done at once."""
_TOGETHER = 256
"""Replies that a node's store hands over, or lets go of, at a time."""

log = logging.getLogger(__name__)


class Said(NamedTuple):
    """What a worker says to the hub."""

    number: int | None
    """Of the answer that is waited for; None: nobody waits."""
    what: str
    """A method of `_Holder`."""
    arguments: tuple[Any, ...]


class Heard(NamedTuple):
    """What the hub answers."""

    number: int
    value: Any
    error: AnchoredError | None


class Wire(Protocol):
    """What carries a worker's words to the hub and back; raises Stopped where the hub is gone, or does without it."""

    async def say(self, words: Sequence[Said]) -> None: ...

    async def hear(self) -> list[Heard]:
        """The next answers; waits until there are some."""
        ...


class Line:
    """One worker's way to the hub. What is said while the wire is busy goes together with the next words."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._numbers = itertools.count()
        self._unsaid: list[Said] = []
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._saying: asyncio.Task[None] | None = None
        self._hearing: asyncio.Task[None] | None = None
        self._failure: Exception | None = None

    async def ask(self, what: str, *arguments: Any) -> Any:
        """What the hub's answer is; raises what the hub raises, and Stopped when it is gone."""
        if self._failure:
            raise self._failure
        self._hearing = self._hearing or asyncio.create_task(self._hear())
        number, answer = next(self._numbers), asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        self._say(Said(number, what, arguments))
        try:
            return await answer
        finally:
            del self._asked[number]

    def tell(self, what: str, *arguments: Any) -> None:
        """The same, for what has no answer; heard in the order of saying."""
        self._say(Said(None, what, arguments))

    async def close(self) -> None:
        """Say what is not said yet."""
        if self._saying:
            await self._saying
        if self._hearing:
            self._hearing.cancel()
            await asyncio.gather(self._hearing, return_exceptions=True)

    def _say(self, said: Said) -> None:
        self._unsaid.append(said)
        if self._saying is None:
            self._saying = asyncio.create_task(self._send())

    async def _send(self) -> None:
        try:
            while self._unsaid:
                words, self._unsaid = self._unsaid, []
                await self._wire.say(words)
        except Exception as error:  # nobody shall wait for an answer that cannot come
            self._fail(error)
        finally:
            self._saying = None

    async def _hear(self) -> None:
        try:
            while True:
                for heard in await self._wire.hear():
                    answer = self._asked.get(heard.number)
                    if answer and not answer.done():  # else nobody waits for it any more
                        answer.set_exception(heard.error) if heard.error else answer.set_result(heard.value)
        except Exception as error:  # nobody shall wait for an answer that cannot come
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._failure = self._failure or error
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(self._failure)


class Hub:
    """What the workers share; `path` is the store's, `cap_usd` the run's budget (None: counted, not bounded)."""

    def __init__(self, path: Path, cap_usd: float | None = None) -> None:
        self.store = ReplyStore(path)
        self.purse = Purse(cap_usd, self.store.spent())
        self._gates: dict[str, Gate] = {}
        self._workers: dict[str, _Holder] = {}
        self._gone: set[str] = set()

    async def say(self, worker: str, words: Sequence[Said]) -> None:
        """Do what a worker asks for, in this order; what has to wait is answered later than what has not."""
        holder = self._holder(worker)
        for said in words:
            holder.do(said)

    async def hear(self, worker: str) -> list[Heard]:
        """The next answers to a worker; waits until there are some."""
        return await self._holder(worker).answers()

    def lose(self, worker: str) -> None:
        """A worker is gone; idempotent."""
        self._gone.add(worker)
        if holder := self._workers.pop(worker, None):
            holder.drop_all()

    def spent(self) -> Spent:
        """What the run has cost so far."""
        return self.purse.spent()

    async def close(self) -> Spent:
        """Write down what is not written yet; what was spent in the end."""
        for worker in list(self._workers):
            self.lose(worker)
        await self.keep([])
        self.store.close()
        return self.spent()

    def _holder(self, worker: str) -> _Holder:
        if worker in self._gone:
            raise Stopped(f"{worker} was out of reach and is not waited for any more; others do its work")
        if worker not in self._workers:
            self._workers[worker] = _Holder(self)
        return self._workers[worker]

    def gate(self, endpoint: Bounded) -> Gate:
        if endpoint.name not in self._gates:
            self._gates[endpoint.name] = gate_of(endpoint)
        return self._gates[endpoint.name]

    async def keep(self, rows: Sequence[StoredRow]) -> None:
        try:
            await self.store.keep_rows(rows, self.purse)
        except Exception as error:
            self.store.failure = self.store.failure or str(error)
            raise


@dataclass(frozen=True, slots=True)
class Bounded:
    """An endpoint by its name, the same for all workers, and its limits."""

    name: str
    concurrency: int
    requests_per_minute: float | None
    tokens_per_minute: float | None


@dataclass(slots=True)
class _Held:
    """A slot of a gate."""

    gate: Gate
    slot: Slot


class _Holder:
    """What one worker holds, by the numbers that it gave; the methods are what it may ask for."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._slots: dict[int, _Held] = {}
        self._reserved: dict[int, Reservation] = {}
        self._waiting: dict[int, asyncio.Task[Any]] = {}
        self._doing: set[asyncio.Task[None]] = set()
        self._answers: list[Heard] = []
        self._answered = asyncio.Event()

    def do(self, said: Said) -> None:
        """Do it now, or begin to."""
        task = asyncio.create_task(self._do(said)) if said.what in _WAIT else None
        if task:
            self._doing.add(task)
            task.add_done_callback(self._doing.discard)
            return
        try:
            value, error = getattr(self, said.what)(*said.arguments), None
        except AnchoredError as raised:
            value, error = None, raised
        self._answer(said, value, error)

    async def answers(self) -> list[Heard]:
        await self._answered.wait()
        self._answered.clear()
        answers, self._answers = self._answers, []
        return answers

    async def enter(self, number: int, endpoint: Bounded, tokens: float) -> float:
        """Wait for a slot; the room there is at the endpoint."""
        gate = self._hub.gate(endpoint)
        self._slots[number] = _Held(gate, Slot(gate, tokens))
        return await self._take(number, first=False)

    async def renew(self, number: int) -> float:
        return await self._take(number, first=True)

    def leave(self, number: int) -> None:
        """Give a slot back, or up where it is waited for."""
        self._give_up(number)
        if held := self._slots.pop(number, None):
            held.slot.leave()

    def used(self, number: int, tokens: float) -> None:
        self._slots[number].slot.used(tokens)

    def too_many(self, number: int) -> None:
        self._slots[number].slot.too_many()

    def replied(self, endpoint: Bounded) -> None:
        self._hub.gate(endpoint).replied()

    def pause(self, endpoint: Bounded, seconds: float) -> None:
        self._hub.gate(endpoint).pause(seconds)

    def heard(self, endpoint: Bounded, quotas: Quotas, seconds_ago: float) -> None:
        self._hub.gate(endpoint).heard(quotas, asyncio.get_running_loop().time() - seconds_ago)

    async def reserve(self, number: int, model: str, usd: float) -> None:
        with self._wait(number):
            await self._hub.purse.set_aside(usd)
            self._reserved[number] = Reservation(model, usd)

    def settle(self, number: int, spending: Spending | None) -> None:
        """This is what came of what was set aside, or is not waited for any more."""
        self._give_up(number)
        if reservation := self._reserved.pop(number, None):
            self._hub.purse.settle(reservation.usd, spending)

    def look_up(self, fingerprint: str, request: Request) -> Reply | None:
        return self._hub.store.find(fingerprint, request)

    async def keep(self, rows: Sequence[StoredRow]) -> None:
        await self._hub.keep(rows)

    def lacking(self, keys: Sequence[str]) -> list[str]:
        """Those keys of replies that the store does not have."""
        return [key for key in keys if key not in self._hub.store]

    def drop_all(self) -> None:
        for number in list(self._waiting):
            self._give_up(number)
        for number in list(self._slots):
            self.leave(number)
        for number, reservation in list(self._reserved.items()):
            self.settle(number, reservation.spending)  # the worst case, as nothing is known of it

    async def _do(self, said: Said) -> None:
        try:
            if self._hub.store.failure:  # what cannot be kept shall not be paid for
                raise DataError(self._hub.store.failure)
            self._answer(said, await getattr(self, said.what)(*said.arguments), None)
        except AnchoredError as error:
            self._answer(said, None, error)

    def _answer(self, said: Said, value: Any, error: AnchoredError | None) -> None:
        if said.number is not None:
            self._answers.append(Heard(said.number, value, error))
            self._answered.set()

    async def _take(self, number: int, *, first: bool) -> float:
        held = self._slots[number]
        with self._wait(number):
            await held.slot.take(first=first)
        return held.gate.room

    @contextmanager
    def _wait(self, number: int) -> Iterator[None]:
        task = asyncio.current_task()
        assert task
        self._waiting[number] = task
        try:
            yield
        finally:
            del self._waiting[number]

    def _give_up(self, number: int) -> None:
        if task := self._waiting.get(number):
            task.cancel()


class SharedGate:
    """The gate of an endpoint that the hub keeps, for one worker; `Limits`."""

    def __init__(self, line: Line, endpoint: Bounded, numbers: Iterator[int]) -> None:
        self.line, self.endpoint = line, endpoint
        self.room = float(endpoint.concurrency)
        """As last heard of."""
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when this worker asks the endpoint for nothing any more."""
        self._numbers = numbers

    @asynccontextmanager
    async def slot(self, tokens: float = 0) -> AsyncIterator[SharedSlot]:
        slot = SharedSlot(self, next(self._numbers))
        try:
            await slot.wait("enter", slot.number, self.endpoint, tokens)
            yield slot
        finally:
            self.line.tell("leave", slot.number)

    def replied(self) -> None:
        self.line.tell("replied", self.endpoint)

    def heard(self, quotas: Quotas, sent: float) -> None:
        if quotas.requests or quotas.tokens:
            self.line.tell("heard", self.endpoint, quotas, asyncio.get_running_loop().time() - sent)

    def pause(self, seconds: float) -> None:
        self.line.tell("pause", self.endpoint, seconds)

    def open_for_good(self) -> None:
        """Let everyone of this worker through: nothing is sent any more. The others are not touched."""
        if not self.opened.done():
            self.opened.set_result(None)


class SharedSlot:
    """A slot of a shared gate; `HeldSlot`."""

    def __init__(self, gate: SharedGate, number: int) -> None:
        self.number = number
        self._gate = gate

    async def wait(self, what: str, *arguments: Any) -> None:
        """Until the hub lets it through, or the gate is open for good."""
        asked = asyncio.ensure_future(self._gate.line.ask(what, *arguments))
        try:
            await asyncio.wait({asked, self._gate.opened}, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                self._gate.room = asked.result()
        finally:
            asked.cancel()

    async def renew(self) -> None:
        await self.wait("renew", self.number)

    def used(self, tokens: float) -> None:
        self._gate.line.tell("used", self.number, tokens)

    def too_many(self) -> None:
        self._gate.line.tell("too_many", self.number)


class SharedPurse:
    """The run's money, for one worker; `Reserves`."""

    def __init__(self, line: Line, numbers: Iterator[int]) -> None:
        self._line, self._numbers = line, numbers

    @asynccontextmanager
    async def reserved(self, model: str, usd: float) -> AsyncIterator[Reservation]:
        reservation, number = Reservation(model, usd), next(self._numbers)
        try:
            await self._line.ask("reserve", number, model, usd)
        except BaseException:
            self._line.tell("settle", number, None)
            raise
        try:
            yield reservation
        finally:
            self._line.tell("settle", number, reservation.spending)


class SharedReplies:
    """The run's store, for one worker; `Replies`. What was spent is the hub's to keep.

    `node_store` has replies until the hub's has them; None: they are in memory on their way.
    """

    def __init__(self, line: Line, node_store: ReplyStore | None = None) -> None:
        self.failure = ""
        self._line = line
        self._node_store = node_store
        self._arrived: list[str] = []
        """Keys of replies that the hub has, and the node's store still."""

    async def look_up(self, fingerprint: str, request: Request) -> Reply | None:
        return await self._line.ask("look_up", fingerprint, request)

    async def keep(self, entries: Sequence[Entry], purse: Purse | None = None) -> None:
        if not entries:
            return
        rows = [stored_row(entry) for entry in entries]
        await self._at_node(lambda store: store.put_rows(rows))
        await self._line.ask("keep", rows)
        self._arrived += [str(key) for key, *_ in rows]
        if len(self._arrived) >= _TOGETHER:
            arrived, self._arrived = self._arrived, []
            await self._at_node(lambda store: store.remove(arrived))

    async def _at_node(self, do: Callable[[ReplyStore], None]) -> None:
        """Do it to the node's store, without which the hub's is enough."""
        if self._node_store:
            try:
                await asyncio.to_thread(do, self._node_store)
            except DataError as error:
                log.warning("replies are kept in the run folder alone, not on this node: %s", error)
                self._node_store = None


async def hand_over(store: ReplyStore, line: Line) -> None:
    """Merge a node's store into the hub's: what that has not, it gets, and the node's is empty."""
    while keys := store.keys(_TOGETHER):
        if lacking := await line.ask("lacking", keys):
            await line.ask("keep", store.rows(lacking))
        await asyncio.to_thread(store.remove, keys)


@dataclass(frozen=True, slots=True)
class Books:
    """What chats are made with: where their replies are kept, what they are paid from, what bounds them."""

    replies: Replies
    purse: Reserves | None = None
    limits: Callable[[EndpointSettings], Limits] = gate_of
    worker: str = ""
    """Whose they are, where there are several."""

    def remember(self, chat: Chat, *, paid: bool) -> Remembered:
        """The chat behind the store."""
        return Remembered(self.replies, chat, self.purse if paid and isinstance(self.purse, Purse) else None)


def books_of(worker: str, line: Line, *, counts_money: bool, node_store: ReplyStore | None = None) -> Books:
    """A worker's, which are the hub's; `node_store` lies on its own node."""
    numbers = itertools.count()
    purse = SharedPurse(line, numbers) if counts_money else None

    def limits(settings: EndpointSettings) -> SharedGate:
        name = content_hash(settings.model_dump(mode="json"))
        bounds = (settings.concurrency, settings.requests_per_minute, settings.tokens_per_minute)
        return SharedGate(line, Bounded(name, *bounds), numbers)

    return Books(SharedReplies(line, node_store), purse, limits, worker)
