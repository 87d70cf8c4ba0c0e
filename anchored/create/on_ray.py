"""The engine that makes rows on a Ray cluster: blocks of prompts go to workers on its nodes, and their rows come back.

Workers make each row by the same function as a run in one process. What they share lives in one actor on the machine of
this process, the `Hub` of `llm.shared`, beside the run folder. A worker that ends, alone or with its node, is replaced
where there is room; its blocks are made anew by others, which find every reply that it had in the hub's store.

Ray's own stream of blocks (Ray Data) is not used: what is tried next depends on the rows made so far (pilot, target),
workers and their servers outlive each such round, and the order and the bound of what waits are the stage's own
(`ask.work_in_order`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import re
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from anchored.create.desk import CreateChats, Desk
from anchored.create.engine import Job, Made, make_row
from anchored.create.row_file import RowFile
from anchored.create.settings import POLICY, CreateSettings, RaySettings
from anchored.errors import AnchoredError, RecipeError, Stopped
from anchored.llm.ask import AHEAD, work_in_order, work_through
from anchored.llm.chat import Reply, Request
from anchored.llm.money import Spent
from anchored.llm.shared import Books, Heard, Hub, Line, Said, books_of
from anchored.process import settle_environment
from anchored.progress import Progress, Silent
from anchored.records import Pair, Prompt
from anchored.runs import one_line

ROWS_OF_A_WORKER = 256
"""That it works on at a time."""
MOST_ENDS = 3
"""Workers that one block may end, and that may end at one place without a block made."""
GATHERING_SECONDS = 20.0
"""So long the first workers leave work to those that are still starting."""
CLOSING_SECONDS = 30.0
_LOOKING_SECONDS = 1.0
_WAITING_CALLS = 100_000
_COLOUR = re.compile(r"\x1b\[\d*m")
_TELLING = ("The actor died", "The node", "The actor is dead", "Owner")

log = logging.getLogger(__name__)

OpenChats = Callable[[Books, Progress], AbstractAsyncContextManager[CreateChats]]


@dataclass(frozen=True, slots=True)
class Order:
    """What workers are made with."""

    settings: CreateSettings
    open_chats: OpenChats
    """Opens those who answer, on the worker's node."""
    counts_money: bool
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


class Worker:
    """One process on a node: makes the rows of the blocks that it is given, many at once."""

    def __init__(self, name: str, order: Order, hub: Any) -> None:
        self._name, self._order, self._hub = name, order, hub
        self._stack = AsyncExitStack()
        self._notes = _Notes()
        self._making: set[asyncio.Task[Any]] = set()

    async def begin(self, keys: Mapping[str, str]) -> str:
        """Open the chats; the node's id. Keys come by this call, since Ray writes down what an actor is made with."""
        settle_environment()
        os.environ.update(keys)
        _go_to(self._order.folder)
        logging.getLogger("anchored").addHandler(self._notes.handler)
        line = Line(_RayWire(self._hub, self._name))
        self._stack.push_async_callback(line.close)
        books = books_of(self._name, line, counts_money=self._order.counts_money)
        self._chats = await self._stack.enter_async_context(self._order.open_chats(books, self._notes))
        self._desk = Desk(self._order.settings, self._chats)
        return _ray().get_runtime_context().get_node_id()

    async def make(self, prompts: Sequence[Prompt]) -> Block:
        task = asyncio.current_task()
        assert task
        self._making.add(task)
        try:
            rows = await work_through(prompts, lambda _, prompt: make_row(prompt, self._desk), len(prompts))
        finally:
            self._making.discard(task)
        return Block(rows, self._counted())

    async def notes(self) -> list[str]:
        """What people should hear of; waits until there is something."""
        return await self._notes.taken()

    async def close(self) -> None:
        """Give up what is under way, close the chats and stop their servers."""
        for task in self._making:
            task.cancel()
        await asyncio.gather(*self._making, return_exceptions=True)
        await self._stack.aclose()

    def _counted(self) -> dict[str, Asked]:
        found = {role: Asked(chat.name, chat.asked, chat.hits) for role, chat in self._chats.items()}
        for chat in self._chats.values():
            chat.asked = chat.hits = 0
        return found


@dataclass(slots=True)
class RemoteChat:
    """What is known here of those who answer in one role: counts, and the run's money."""

    name: str = ""
    asked: int = 0
    hits: int = 0
    purse: RemoteMoney | None = None

    async def reply(self, request: Request) -> Reply:
        raise AssertionError("workers ask, not this process")


@dataclass(slots=True)
class RemoteMoney:
    """What the hub said last of the run's money."""

    last: Spent

    @property
    def spent_usd(self) -> float:
        return self.last.run_usd

    def spent(self) -> Spent:
        return self.last


class Cluster:
    """The engine: hands blocks of prompts to workers. `chats` are what the stage tells of those who answer."""

    def __init__(self, chats: dict[str, RemoteChat], pool: _Pool, rows_per_block: int) -> None:
        self.chats = chats
        self._pool = pool
        self._rows_per_block = rows_per_block

    async def rows(
        self, jobs: Iterable[Job], finish: Callable[[RowFile, Made], Pair], take: Callable[[RowFile, Pair], None]
    ) -> None:
        async def made(_: int, block: list[Job]) -> list[tuple[RowFile, Pair]]:
            answer = await self._pool.make([prompt for _, prompt in block])
            self._count(answer)
            return [(file, finish(file, row)) for (file, _), row in zip(block, answer.rows, strict=True)]

        def taken(block: list[tuple[RowFile, Pair]]) -> None:
            for file, pair in block:
                take(file, pair)

        # as many rows wait for a slow one before them as in a run in one process
        ahead = max(2, AHEAD // self._rows_per_block)
        await work_in_order(_blocks(jobs, self._rows_per_block), made, taken, outstanding=ahead // 2, ahead=ahead)

    def _count(self, block: Block) -> None:
        for role, counted in block.chats.items():
            chat = self.chats[role]
            chat.name = counted.name
            chat.asked += counted.asked
            chat.hits += counted.hits


@asynccontextmanager
async def cluster(order: Order, replies: Path, progress: Progress) -> AsyncIterator[Cluster]:
    """Workers on the Ray cluster that the settings name, for the block; `replies` is the run's store."""
    ray = _ray()
    settings = order.settings
    with _connected(settings.ray):
        here = ray.get_runtime_context().get_node_id()
        hub = (
            ray.remote(Hub)
            .options(num_cpus=0, scheduling_strategy=_on(here), max_concurrency=_WAITING_CALLS)
            .remote(replies.resolve(), settings.budget_usd)
        )
        if _holds_models(settings) and not settings.ray.gpus and (found := ray.cluster_resources().get("GPU")):
            progress.note(f"create: Ray has {found:g} GPUs, but workers see none of them; create.ray.gpus is 0")
        money = RemoteMoney(await _hub_answer(hub.spent.remote())) if order.counts_money else None
        prices, roles = settings.prices(), [*([POLICY] if settings.asks_policy else ()), *settings.endpoints()]
        chats = {role: RemoteChat(purse=money if role in prices else None) for role in roles}
        pool = _Pool(order, hub, money, progress)
        try:
            async with pool:
                yield Cluster(chats, pool, settings.ray.rows_per_block)
        finally:
            spent = await _hub_answer(hub.close.remote())
            if money:
                money.last = spent


def _holds_models(settings: CreateSettings) -> bool:
    """Whether a worker computes answers itself, or starts a server that does."""
    serves = any(endpoint.serve not in (None, "pocket") for endpoint in settings.endpoints().values())
    return serves or (settings.asks_policy and settings.sample.base_url is None)


class _Ended(Exception):
    """The process that was to answer is gone, or out of reach."""


@dataclass(eq=False, slots=True)
class _Member:
    """A worker as seen from here."""

    place: str
    """Where it is to be: a node and a number there, or the number alone where Ray chooses."""
    name: str
    actor: Any
    blocks: int = 0
    node: str = ""
    """Where it is, once it is ready."""


class _Pool:
    """The workers: started where there is room, replaced when they end, given as many blocks as they can work on."""

    def __init__(self, order: Order, hub: Any, money: RemoteMoney | None, progress: Progress) -> None:
        self._order, self._hub, self._money, self._progress = order, hub, money, progress
        self._settings = order.settings.ray
        self._keys = {name: os.environ[name] for name in order.settings.key_variables() if name in os.environ}
        self._blocks_each = max(1, ROWS_OF_A_WORKER // self._settings.rows_per_block)
        self._ready: list[_Member] = []
        self._tended: dict[str, tuple[_Member, asyncio.Task[None]]] = {}
        """By place: those that are starting or ready."""
        self._ends: dict[str, int] = {}
        """By place: workers that ended there since a block was made."""
        self._why = ""
        """How the last one ended."""
        self._waiting: deque[asyncio.Future[_Member]] = deque()
        self._numbers = itertools.count(1)
        self._failure: Exception | None = None
        self._looking: asyncio.Task[None] | None = None
        self._gathers_until = 0.0
        self._told = False
        """Whether people know how many workers there are."""

    async def __aenter__(self) -> _Pool:
        self._gathers_until = asyncio.get_running_loop().time() + GATHERING_SECONDS
        self._looking = asyncio.create_task(self._look())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._looking
        members = [member for member, _ in self._tended.values()]
        tasks = [self._looking, *(task for _, task in self._tended.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        closing = [asyncio.ensure_future(_answer(member.actor.close.remote())) for member in self._ready]
        if closing:
            await asyncio.wait(closing, timeout=CLOSING_SECONDS)
            await asyncio.gather(
                *(task for task in closing if task.done() or not task.cancel()), return_exceptions=True
            )
        for member in members:
            _ray().kill(member.actor)

    async def make(self, prompts: Sequence[Prompt]) -> Block:
        """The rows of some prompts, by the first worker that has room and lives long enough."""
        for _ in range(MOST_ENDS):
            member = await self._free()
            try:
                block: Block = await _answer(member.actor.make.remote(prompts))
            except _Ended as end:
                self._lose(member, end)
                continue
            finally:
                member.blocks -= 1
                self._serve()
            self._ends.pop(member.place, None)
            if self._money:
                self._money.last = await _hub_answer(self._hub.spent.remote())
            return block
        raise Stopped(
            f"create: {MOST_ENDS} workers ended one after another while they made the row of {prompts[0].id!r}, among "
            f"others (the last: {self._why}); see whether workers have enough memory and what own filters do, then "
            "the same command goes on"
        )

    async def _free(self) -> _Member:
        place: asyncio.Future[_Member] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        self._serve()
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and not place.exception():
                place.result().blocks -= 1
                self._serve()
            raise

    def _serve(self) -> None:
        """Give those who wait the least busy worker, as long as one has room."""
        while self._waiting:
            place = self._waiting[0]
            member = min(self._ready, key=lambda one: one.blocks, default=None)
            if place.done():  # cancelled
                pass
            elif self._failure:
                place.set_exception(self._failure)
            elif member is None or member.blocks >= (1 if self._gathers() else self._blocks_each):
                return
            else:
                member.blocks += 1
                place.set_result(member)
            self._waiting.popleft()

    def _gathers(self) -> bool:
        """Whether some of the first workers are still starting."""
        return len(self._ready) < len(self._tended) and asyncio.get_running_loop().time() < self._gathers_until

    def _fail(self, error: Exception) -> None:
        self._failure = self._failure or error
        self._serve()

    async def _look(self) -> None:
        try:
            await self._keep_looking()
        except Exception as error:  # nobody shall wait for workers that are not looked for
            self._fail(error)

    async def _keep_looking(self) -> None:
        """See again and again which workers are missing, and how long there has been none."""
        loop = asyncio.get_running_loop()
        since = loop.time()
        while True:
            places = self._places()
            for place in places:
                if place not in self._tended and self._ends.get(place, 0) < MOST_ENDS:
                    self._start(place)
            if self._ready:
                since = loop.time()
            elif loop.time() - since > self._settings.wait_seconds or self._is_hopeless(places):
                self._fail(Stopped(self._why_none(places)))
            if self._ready and not self._told and not self._gathers():
                self._told = True
                nodes = len({member.node for member in self._ready})
                self._progress.note(f"create: Ray has {_some(len(self._ready), 'worker')} on {_some(nodes, 'node')}")
            self._serve()
            await asyncio.sleep(_LOOKING_SECONDS)

    def _places(self) -> list[str]:
        """Where workers should be."""
        if self._settings.workers:
            return [f" {number}" for number in range(self._settings.workers)]
        nodes = [node for node in _ray().nodes() if node["Alive"]]
        return [f"{node['NodeID']} {number}" for node in nodes for number in range(self._room(node["Resources"]))]

    def _room(self, resources: Mapping[str, float]) -> int:
        """How many workers a node is to have."""
        cpus, gpus = self._settings.cpus, self._settings.gpus
        by_cpus = resources.get("CPU", 0) // cpus if cpus else 1_000_000
        return int(min(by_cpus, resources.get("GPU", 0) // gpus if gpus else 1))

    def _is_hopeless(self, places: Sequence[str]) -> bool:
        """Whether workers ended wherever there could be one."""
        return bool(places) and all(self._ends.get(place, 0) >= MOST_ENDS for place in places)

    def _why_none(self, places: Sequence[str]) -> str:
        needs = f"{self._settings.cpus:g} CPU and {self._settings.gpus:g} GPU (create.ray.cpus and gpus)"
        if self._why:
            return f"create: no worker is left (the last one: {self._why}); the same command goes on from here"
        if not places:
            return f"create: no node of the Ray cluster has the {needs} that a worker takes; see `ray status`"
        return (
            f"create: no worker could start in {self._settings.wait_seconds:g} s (create.ray.wait_seconds); each takes "
            f"{needs}, see `ray status`"
        )

    def _start(self, place: str) -> None:
        name, node = f"worker {next(self._numbers)}", place.rpartition(" ")[0]
        actor = (
            _ray()
            .remote(Worker)
            .options(
                num_cpus=self._settings.cpus,
                num_gpus=self._settings.gpus,
                max_restarts=0,
                scheduling_strategy=_on(node) if node else "SPREAD",
            )
            .remote(name, self._order, self._hub)
        )
        member = _Member(place, name, actor)
        self._tended[place] = member, asyncio.create_task(self._tend(member))

    async def _tend(self, member: _Member) -> None:
        """Start a worker, tell what it has to say, and notice its end."""
        try:
            member.node = await _answer(member.actor.begin.remote(self._keys))
            self._ready.append(member)
            self._serve()
            while True:
                for note in await _answer(member.actor.notes.remote()):
                    self._progress.note(f"{member.name}: {note}")
        except _Ended as end:
            self._lose(member, end)
        except Exception as error:  # nobody shall wait for a worker that cannot be
            self._fail(error)

    def _lose(self, member: _Member, end: _Ended) -> None:
        """A worker is gone; idempotent."""
        tended = self._tended.get(member.place)
        if tended is None or tended[0] is not member:
            return
        del self._tended[member.place]
        self._why = one_line(end)
        self._ends[member.place] = self._ends.get(member.place, 0) + 1
        if member in self._ready:
            self._ready.remove(member)
            self._progress.note(f"create: {member.name} is gone ({self._why}); others make its rows")
        self._hub.lose.remote(member.name)
        _ray().kill(member.actor)  # it may only be out of reach


class _RayWire:
    """Carries a worker's words to the hub; `Wire`."""

    def __init__(self, hub: Any, worker: str) -> None:
        self._hub, self._worker = hub, worker

    async def say(self, words: Sequence[Said]) -> None:
        await _hub_answer(self._hub.say.remote(self._worker, words))

    async def hear(self) -> list[Heard]:
        return await _hub_answer(self._hub.hear.remote(self._worker))


class _Notes(Silent):
    """Collects what a worker has to say."""

    def __init__(self) -> None:
        self.handler = logging.Handler(logging.WARNING)
        self.handler.emit = lambda record: self.note(record.getMessage())
        self._lines: list[str] = []
        self._come = asyncio.Event()

    def note(self, text: str) -> None:
        self._lines.append(text)
        self._come.set()

    async def taken(self) -> list[str]:
        await self._come.wait()
        self._come.clear()
        lines, self._lines = self._lines, []
        return lines


def _some(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"


def _blocks(jobs: Iterable[Job], rows: int) -> Iterator[list[Job]]:
    remaining = iter(jobs)
    while block := list(islice(remaining, rows)):
        yield block


async def _answer(reference: Any) -> Any:
    """What an actor's method returned; raises its AnchoredErrors as they are, and _Ended where the actor is gone."""
    errors = _ray().exceptions
    try:
        return await reference
    except errors.RayTaskError as error:
        if isinstance(error.cause, AnchoredError):
            raise error.cause from None
        raise
    except errors.TaskCancelledError:
        raise
    except errors.RayError as error:
        raise _Ended(_reason(error)) from None


async def _hub_answer(reference: Any) -> Any:
    """The same of the hub, without which nothing goes on."""
    try:
        return await _answer(reference)
    except _Ended as end:
        raise Stopped(
            f"create: the process that keeps the run's limits and replies is gone ({end}); the same command goes on "
            "from here"
        ) from None


def _reason(error: Exception) -> str:
    """Ray's many lines about an end in one: the one that tells most."""
    lines = [line.strip() for line in _COLOUR.sub("", str(error)).splitlines() if line.strip()]
    if lines and "creation task" in lines[0]:  # a traceback of the node's
        return lines[-1][:300]
    return next((line for line in lines if line.startswith(_TELLING)), next(iter(lines), type(error).__name__))[:300]


def _ray() -> Any:
    try:
        import ray
        import ray.exceptions
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise RecipeError(f'create.engine: ray cannot be loaded ({error}); pip install "anchored[ray]"') from None
    return ray


def _on(node: str) -> Any:
    return _ray().util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)


class _connected:
    """Connected to the cluster for the block, or to Ray started here for it."""

    def __init__(self, settings: RaySettings) -> None:
        self._address = settings.address

    def __enter__(self) -> None:
        self._environment = set(os.environ)
        ray = _ray()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        starts = self._address is None and "RAY_ADDRESS" not in os.environ
        more: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 2**28} if starts else {}
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=self._address, log_to_driver=False, logging_level=logging.ERROR, **more)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise RecipeError(
                f"create.ray.address: no Ray cluster could be used at {self._address or 'this machine'} "
                f"({one_line(error)[:300]}); `ray start --head` starts one, null starts one for the stage"
            ) from None
        finally:
            with suppress(ValueError):  # not in the main thread
                signal.signal(signal.SIGTERM, handler)  # Ray has put its own there

    def __exit__(self, *_: object) -> None:
        _ray().shutdown()
        # Ray writes down in the environment how it was started, for the next that is started here
        for name in [name for name in os.environ if name not in self._environment]:
            del os.environ[name]


def _go_to(folder: str) -> None:
    """The folder of the command, where this node has it: paths and modules in the recipe are found from there."""
    with suppress(OSError):
        os.chdir(folder)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
