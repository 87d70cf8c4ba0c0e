"""What the workers of a cluster share, in one actor beside the run folder: limits, money, replies, and who makes what.

Ray's stream of blocks carries prompts to workers and rows back. It knows neither who makes a block nor that a worker
hangs, and keeps a dead worker's blocks until that very worker is up again. The hub knows: a worker tells it which block
it begins, and that it lives; what a lost one had begun is named, so that others make it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anchored.create.desk import CreateChats
from anchored.create.engine import Made
from anchored.create.settings import CreateSettings
from anchored.errors import AnchoredError, Stopped
from anchored.llm.shared import Books, Hub
from anchored.progress import Progress
from anchored.records import content_hash
from anchored.runs import one_line

BEAT_SECONDS = 3.0
SILENT_SECONDS = 30.0
"""Without a word from a worker, until it is taken for gone."""

Numbered = tuple[int, bytes]
"""A block of prompts and its number, packed as the hub does not read it."""
OpenChats = Callable[[Books, Progress], AbstractAsyncContextManager[CreateChats]]


@dataclass(frozen=True, slots=True)
class Order:
    """What workers are made with."""

    settings: CreateSettings
    open_chats: OpenChats
    """Opens those who answer, on the worker's node."""
    counts_money: bool
    run: str
    """Names the run among those whose replies a node keeps."""
    folder: str = field(default_factory=os.getcwd)
    """What paths in the settings are relative to."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a worker's chat in one role did since it was asked for this."""

    name: str
    asked: int
    hits: int


@dataclass(frozen=True, slots=True)
class Block:
    """The rows of some prompts, in their order."""

    rows: list[Made]
    chats: dict[str, Asked]


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker has opened its chats."""

    worker: str
    node: str
    crew: int


@dataclass(frozen=True, slots=True)
class Told:
    """What a worker would have people know."""

    worker: str
    text: str


@dataclass(frozen=True, slots=True)
class Gone:
    """A worker has ended, or is taken for it."""

    worker: str
    why: str
    begun: tuple[int, ...]
    """Blocks that it was making."""
    waiting: tuple[int, ...]
    """Blocks that nobody has begun: they may be on their way to it."""
    actor: Any = None
    """Ray's handle of it."""
    hangs: bool = False
    """Whether its process may be there still, which Ray would go on giving blocks."""


@dataclass(frozen=True, slots=True)
class Closed:
    """A worker has closed its chats, as it was asked to."""

    worker: str


@dataclass(frozen=True, slots=True)
class Failed:
    """Nothing can go on."""

    error: Exception


Event = Ready | Told | Gone | Closed | Failed


@dataclass(slots=True)
class _Member:
    """A worker as the hub knows it."""

    actor: str
    """Ray's name for the actor, which keeps it when it is started again in a new process."""
    node: str
    crew: int
    handle: Any
    heard: float
    """When it last said that it lives, by the loop's clock."""
    closed: bool = False


@dataclass(slots=True)
class _Queue:
    """Blocks that a crew is to make, in the order of their offer."""

    blocks: list[Numbered] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    reader: str = ""


class RayHub(Hub):
    """The hub of a run on Ray."""

    def __init__(self, path: Path, cap_usd: float | None = None) -> None:
        super().__init__(path, cap_usd)
        self._keys: Mapping[str, str] = {}
        """The environment's, that endpoints are asked with."""
        self._queues: defaultdict[int, _Queue] = defaultdict(_Queue)
        self._ends = False
        self._members: dict[str, _Member] = {}
        self._numbers = itertools.count(1)
        self._due: set[int] = set()
        """Blocks that were offered and are not done."""
        self._makes: dict[int, str] = {}
        """By block: the worker that has begun it."""
        self._events: list[Event] = []
        self._happened = asyncio.Event()
        self._watched = float("inf")
        self._closing = asyncio.Event()

    # ---- for the process of the command ----

    def keep_keys(self, keys: Mapping[str, str]) -> None:
        """Keys come by this call, since Ray writes down what an actor is made with."""
        self._keys = keys

    def offer(self, crew: int, number: int, block: bytes) -> None:
        """Have a crew make a block, which another one may have been offered before."""
        self._due.add(number)
        queue = self._queues[crew]
        queue.blocks.append((number, block))
        queue.changed.set()

    def done(self, number: int) -> None:
        """Nobody needs to make this block any more."""
        self._due.discard(number)
        self._makes.pop(number, None)

    async def events(self) -> list[Event]:
        """What has happened since the last call; waits until something has."""
        await self._happened.wait()
        self._happened.clear()
        events, self._events = self._events, []
        return events

    def watch(self, nodes: Collection[str]) -> list[int]:
        """Notice who is gone, given the nodes that are alive; the blocks that nobody has begun."""
        now = asyncio.get_running_loop().time()
        stood_still = now - self._watched > SILENT_SECONDS / 2
        self._watched = now
        for worker, member in list(self._members.items()):
            if member.closed:
                continue
            if stood_still:  # this machine did, so nobody could be heard
                member.heard = now
            if member.node not in nodes:
                self._miss(worker, "its node is gone")
            elif now - member.heard > SILENT_SECONDS:
                self._miss(worker, f"nothing was heard of it for {SILENT_SECONDS:g} s", hangs=True)
        return self._waiting()

    def close_workers(self) -> None:
        """Have all workers close their chats."""
        self._closing.set()

    def end(self) -> None:
        """No more blocks come."""
        self._ends = True
        for queue in self._queues.values():
            queue.changed.set()

    # ---- for the stream and the workers ----

    async def next_blocks(self, crew: int, reader: str) -> Sequence[Numbered] | None:
        """The next blocks for a crew; waits until there are some. None: no more come."""
        queue = self._queues[crew]
        queue.reader = queue.reader or reader
        if queue.reader != reader:  # what the first one took would be lost
            gone = "create: the process that hands prompts to workers is gone; the same command goes on from here"
            self._tell(Failed(Stopped(gone)))
            return None
        while not queue.blocks:
            if self._ends:
                return None
            await queue.changed.wait()
            queue.changed.clear()
        blocks, queue.blocks = queue.blocks, []
        return blocks

    def join(self, actor: str, node: str, crew: int, handle: Any = None) -> tuple[str, Mapping[str, str]] | None:
        """A worker starts: its name, and the keys; None where there is nothing to do any more."""
        for worker, member in list(self._members.items()):
            if member.actor == actor:
                self._miss(worker, "its process ended")
        if self._closing.is_set():
            return None
        worker = f"worker {next(self._numbers)}"
        self._members[worker] = _Member(actor, node, crew, handle, asyncio.get_running_loop().time())
        return worker, self._keys

    def ready(self, worker: str) -> None:
        if member := self._members.get(worker):
            self._tell(Ready(worker, member.node, member.crew))

    def beat(self, worker: str) -> bool:
        """A worker lives; whether it is still one of the run."""
        if member := self._members.get(worker):
            member.heard = asyncio.get_running_loop().time()
        return member is not None

    def begins(self, worker: str, number: int) -> bool:
        """Whether a worker is to make a block: another one may be at it, or done."""
        if number not in self._due or number in self._makes or worker not in self._members:
            return False
        self._makes[number] = worker
        return True

    def tell(self, worker: str, text: str) -> None:
        self._tell(Told(worker, text))

    def fail(self, worker: str, error: Exception) -> None:
        """A worker cannot open its chats."""
        if worker in self._members:  # else it was out of reach
            self._tell(Failed(error))

    async def closing(self) -> None:
        """Returns when workers are to close their chats."""
        await self._closing.wait()

    def closed(self, worker: str) -> None:
        if member := self._members.get(worker):
            member.closed = True
        self._tell(Closed(worker))

    def _miss(self, worker: str, why: str, *, hangs: bool = False) -> None:
        member = self._members.pop(worker)
        begun = tuple(number for number, by in self._makes.items() if by == worker)
        waiting = tuple(self._waiting())
        for number in begun:
            del self._makes[number]
        self.lose(worker)
        self._tell(Gone(worker, why, begun, waiting, member.handle, hangs))

    def _waiting(self) -> list[int]:
        """Blocks that nobody has begun."""
        return sorted(self._due - self._makes.keys())

    def _tell(self, event: Event) -> None:
        self._events.append(event)
        self._happened.set()


async def hub_answer(reference: Any) -> Any:
    """What the hub returned; raises its AnchoredErrors as they are, and Stopped where it is gone."""
    from ray import exceptions

    try:
        return await reference
    except exceptions.TaskCancelledError:
        raise
    except exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, AnchoredError):
            raise cause from None
        if isinstance(error, exceptions.RayTaskError):
            raise
        raise Stopped(
            f"create: the process that keeps the run's limits and replies is gone ({one_line(error)[:300]}); the same "
            "command goes on from here"
        ) from None


def node_store_path(run: str) -> Path:
    """Where a node keeps a run's replies until the run's own store has them."""
    return Path(tempfile.gettempdir()) / f"anchored-{os.getuid()}" / f"{content_hash([run])[:16]}.sqlite"
