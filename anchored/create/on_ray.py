"""The engine that makes rows on a Ray cluster, over Ray Data: prompts stream to workers on its nodes, and rows back.

One flow lasts as long as the stage: a source that hands out blocks as they are offered (`ray_worker.Blocks`), a pool of
actors that make their rows by the same function as a run in one process (`ray_worker.RowMaker`), and a thread here that
takes what comes out. Which rows are made next (pilot, target, budget) is decided while it flows, so workers and their
servers outlive each such round. What workers share lives in one actor on the machine of this process, beside the run
folder (`ray_hub.RayHub`).

Ray Data starts a worker that ended again where there is room, and hands it the same blocks then. Others do not wait for
that: they are offered what a lost worker had, and whoever is first makes the rows.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import pickle
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from anchored.create.engine import Job, Made
from anchored.create.ray_hub import (
    SILENT_SECONDS,
    Block,
    Closed,
    Event,
    Failed,
    Gone,
    Order,
    RayHub,
    Ready,
    Told,
    hub_answer,
)
from anchored.create.row_file import RowFile
from anchored.create.settings import POLICY, CreateSettings, RaySettings
from anchored.errors import RecipeError, Stopped
from anchored.llm.ask import AHEAD, work_in_order
from anchored.llm.chat import Reply, Request
from anchored.llm.money import Spent
from anchored.progress import Progress
from anchored.records import Pair, Prompt
from anchored.runs import one_line

ROWS_OF_A_WORKER = 512
"""That it works on at a time, in no more than so many blocks:"""
BLOCKS_OF_A_WORKER = 64
MOST_ENDS = 3
"""Workers that one block may end, and that may end for each one there is without a block made."""
GATHERING_SECONDS = 20.0
"""So long the first workers leave work to those that are still starting."""
CLOSING_SECONDS = 30.0
_LOOKING_SECONDS = 1.0
_WAITING_CALLS = 100_000
_UNDER_WAY = 64
"""Blocks that the source may have handed out before the flow has taken them on."""


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

    def __init__(self, chats: dict[str, RemoteChat], flow: _Flow, rows_per_block: int) -> None:
        self.chats = chats
        self._flow = flow
        self._rows_per_block = rows_per_block

    async def rows(
        self, jobs: Iterable[Job], finish: Callable[[RowFile, Made], Pair], take: Callable[[RowFile, Pair], None]
    ) -> None:
        async def made(_: int, block: list[Job]) -> list[tuple[RowFile, Pair]]:
            answer = await self._flow.make([prompt for _, prompt in block])
            self._count(answer)
            return [(file, finish(file, row)) for (file, _), row in zip(block, answer.rows, strict=True)]

        def taken(block: list[tuple[RowFile, Pair]]) -> None:
            for file, pair in block:
                take(file, pair)

        # as many rows wait for a slow one before them as in a run in one process, or so that no worker waits
        ahead = max(2, max(AHEAD, 2 * ROWS_OF_A_WORKER * self._flow.size) // self._rows_per_block)
        await work_in_order(
            _blocks(jobs, self._rows_per_block),
            made,
            taken,
            outstanding=ahead // 2,
            ahead=ahead,
            on_failure=self._flow.halt,
        )

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
            ray.remote(RayHub)
            .options(num_cpus=0, scheduling_strategy=_on(here), max_concurrency=_WAITING_CALLS)
            .remote(replies.resolve(), settings.budget_usd)
        )
        if _holds_models(settings) and not settings.ray.gpus and (found := ray.cluster_resources().get("GPU")):
            progress.note(f"create: Ray has {found:g} GPUs, but workers see none of them; create.ray.gpus is 0")
        money = RemoteMoney(await hub_answer(hub.spent.remote())) if order.counts_money else None
        prices, roles = settings.prices(), [*([POLICY] if settings.asks_policy else ()), *settings.endpoints()]
        chats = {role: RemoteChat(purse=money if role in prices else None) for role in roles}
        keys = {name: os.environ[name] for name in settings.key_variables() if name in os.environ}
        await hub_answer(hub.keep_keys.remote(keys))
        try:
            async with _Flow(order, hub, money, progress) as flow:
                yield Cluster(chats, flow, settings.ray.rows_per_block)
        finally:
            spent = await hub_answer(hub.close.remote())
            if money:
                money.last = spent


def _holds_models(settings: CreateSettings) -> bool:
    """Whether a worker computes answers itself, or starts a server that does."""
    serves = any(endpoint.serve not in (None, "pocket") for endpoint in settings.endpoints().values())
    return serves or (settings.asks_policy and settings.sample.base_url is None)


@dataclass(eq=False, slots=True)
class _Crew:
    """Workers that one flow feeds; where there is a new node, a new one is hired for it."""

    number: int
    size: int
    thread: threading.Thread
    blocks: int = 0
    """That it was offered and has not made."""


@dataclass(eq=False, slots=True)
class _Due:
    """A block that is to be made."""

    prompts: Sequence[Prompt]
    crew: _Crew
    made: asyncio.Future[Block]
    offered: float = 0.0
    """When it was offered last, by the loop's clock."""
    ends: int = 0
    """Workers that ended while they made it."""


class _Flow:
    """Has blocks made: offers no crew more than its workers can work on, and offers again what a lost one had."""

    def __init__(self, order: Order, hub: Any, money: RemoteMoney | None, progress: Progress) -> None:
        self._order, self._hub, self._money, self._progress = order, hub, money, progress
        self._settings = order.settings.ray
        self._blocks_each = _blocks_at_once(self._settings)
        self._crews: list[_Crew] = []
        self._nodes: set[str] = set()
        """For which a crew was hired."""
        self._ready: dict[str, Ready] = {}
        self._due: dict[int, _Due] = {}
        self._numbers = itertools.count()
        self._waiting: deque[asyncio.Future[_Crew]] = deque()
        self._ends = 0
        """Workers that ended since a block was made."""
        self._why = ""
        """How the last one ended."""
        self._failure: Exception | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._taking: set[asyncio.Task[None]] = set()
        self._gathers_until = 0.0
        self._told = self._closes = False
        """Whether people know how many workers there are, and whether all is over."""

    async def __aenter__(self) -> _Flow:
        self._loop = asyncio.get_running_loop()
        _Ending.clear()
        self._hire(_nodes())
        self._gathers_until = self._loop.time() + GATHERING_SECONDS
        self._tasks = [asyncio.create_task(self._safely(work)) for work in (self._look, self._hear)]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Have workers close their chats, and let the flow run dry."""
        self._closes = True
        try:
            await hub_answer(self._hub.close_workers.remote())
            ends = self._loop.time() + CLOSING_SECONDS
            while self._ready and self._loop.time() < ends and not any(task.done() for task in self._tasks):
                await asyncio.sleep(0.02)
            await hub_answer(self._hub.end.remote())
        finally:
            for task in (*self._tasks, *self._taking):
                task.cancel()
            await asyncio.gather(*self._tasks, *self._taking, return_exceptions=True)
            # by itself a flow would not end while Ray has no room for a worker to start again in
            _Ending.set()
            await asyncio.to_thread(_join, [crew.thread for crew in self._crews], CLOSING_SECONDS)

    @property
    def size(self) -> int:
        """How many workers were hired."""
        return sum(crew.size for crew in self._crews)

    async def make(self, prompts: Sequence[Prompt]) -> Block:
        """The rows of some prompts, by the first worker that makes them and lives long enough."""
        crew = await self._room()
        number, due = next(self._numbers), _Due(prompts, crew, self._loop.create_future())
        self._due[number] = due
        try:
            if self._failure:
                raise self._failure
            await self._offer(number, due)
            block = await due.made
        finally:
            if due.made.done() and not due.made.cancelled():
                due.made.exception()  # nobody may have come to wait for it
            del self._due[number]
            due.crew.blocks -= 1
            self._hub.done.remote(number)
            self._serve()
        if self._money:
            self._money.last = await hub_answer(self._hub.spent.remote())
        return block

    def halt(self) -> None:
        """Have nothing made that waits for its turn."""
        for place in self._waiting:
            place.cancel()

    async def _offer(self, number: int, due: _Due) -> None:
        due.offered = self._loop.time()
        await hub_answer(self._hub.offer.remote(due.crew.number, number, pickle.dumps(due.prompts)))

    async def _room(self) -> _Crew:
        """A crew that has room for a block, which counts as offered."""
        place: asyncio.Future[_Crew] = self._loop.create_future()
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
        """Give those who wait the least busy crew, as long as one has room."""
        while self._waiting:
            place = self._waiting[0]
            crew, free = self._freest()
            if place.done():  # cancelled
                pass
            elif self._failure:
                place.set_exception(self._failure)
            elif crew is None or free <= 0:
                return
            else:
                crew.blocks += 1
                place.set_result(crew)
            self._waiting.popleft()

    def _freest(self) -> tuple[_Crew | None, int]:
        """The crew with the most room, and how many blocks more it can work on."""
        each = 1 if self._gathers() else self._blocks_each
        sizes = dict.fromkeys(self._crews, 0)
        for worker in self._ready.values():
            sizes[self._crews[worker.crew]] += 1
        rooms = {crew: size * each - crew.blocks for crew, size in sizes.items() if size}
        best = max(rooms, key=lambda crew: rooms[crew], default=None)
        return best, rooms[best] if best else 0

    def _gathers(self) -> bool:
        """Whether some of the first workers are still starting."""
        return len(self._ready) < self.size and self._loop.time() < self._gathers_until

    def _fail(self, error: Exception) -> None:
        self._failure = self._failure or error
        for due in self._due.values():
            if not due.made.done():
                due.made.set_exception(self._failure)
        self._serve()

    async def _safely(self, work: Callable[[], Any]) -> None:
        try:
            await work()
        except Exception as error:  # nobody shall wait for workers that are not looked after
            self._fail(error)

    # ---- what becomes of workers ----

    async def _hear(self) -> None:
        while True:
            for event in await hub_answer(self._hub.events.remote()):
                await self._meet(event)

    async def _meet(self, event: Event) -> None:
        if isinstance(event, Ready):
            self._ready[event.worker] = event
            self._serve()
        elif isinstance(event, Told):
            self._progress.note(f"{event.worker}: {event.text}")
        elif isinstance(event, Closed):
            self._ready.pop(event.worker, None)
        elif isinstance(event, Failed):
            self._fail(event.error)
        else:
            await self._lose(event)

    async def _lose(self, gone: Gone) -> None:
        """Offer to others what a worker had begun, and what may be on its way to it."""
        self._ends += 1
        self._why = gone.why
        if gone.hangs:
            with suppress(_ray().exceptions.RayError):
                _ray().kill(gone.actor, no_restart=False)
        if self._ready.pop(gone.worker, None) and not self._closes:
            self._progress.note(f"create: {gone.worker} is gone ({gone.why}); others make its rows")
        for due in self._still(gone.begun).values():
            due.ends += 1
            if due.ends >= MOST_ENDS:
                self._fail(self._deadly(due))
        if self._ends >= MOST_ENDS * max(1, self.size):
            self._fail(Stopped(self._why_none()))
        await self._offer_again((*gone.begun, *gone.waiting))

    async def _offer_again(self, numbers: Iterable[int]) -> None:
        """Offer blocks that are not made yet to the crew with the most room."""
        for number, due in self._still(numbers).items():
            best, _ = self._freest()
            if due.made.done() or self._due.get(number) is not due:  # meanwhile
                continue
            due.crew.blocks -= 1
            due.crew = best or due.crew
            due.crew.blocks += 1
            await self._offer(number, due)

    def _still(self, numbers: Iterable[int]) -> dict[int, _Due]:
        """Those of some blocks that are not made yet."""
        return {number: due for number in numbers if (due := self._due.get(number)) and not due.made.done()}

    def _deadly(self, due: _Due) -> Stopped:
        return Stopped(
            f"create: {MOST_ENDS} workers ended one after another while they made the row of {due.prompts[0].id!r}, "
            f"among others (the last: {self._why}); see whether workers have enough memory and what own filters do, "
            "then the same command goes on"
        )

    async def _look(self) -> None:
        """See again and again where workers are missing, and how long there has been none."""
        since = self._loop.time()
        while True:
            nodes = _nodes()
            waiting = await hub_answer(self._hub.watch.remote(set(nodes)))
            await self._offer_again(self._forgotten(waiting))
            if not self._closes:
                self._hire(nodes)
            if self._ready:
                since = self._loop.time()
            elif self._loop.time() - since > self._settings.wait_seconds and not self._closes:
                self._fail(Stopped(self._why_none()))
            if self._ready and not self._told and not self._gathers():
                self._told = True
                count = len({worker.node for worker in self._ready.values()})
                self._progress.note(f"create: Ray has {_some(len(self._ready), 'worker')} on {_some(count, 'node')}")
            self._serve()
            await asyncio.sleep(_LOOKING_SECONDS)

    def _forgotten(self, waiting: Iterable[int]) -> list[int]:
        """Of blocks that nobody has begun, those whose crew has no worker, or was offered them long ago."""
        at_work = {worker.crew for worker in self._ready.values()}
        long_ago = self._loop.time() - SILENT_SECONDS
        still = self._still(waiting).items()
        return [
            number for number, due in still if due.offered < long_ago or (at_work and due.crew.number not in at_work)
        ]

    def _hire(self, nodes: Mapping[str, Mapping[str, float]]) -> None:
        """A crew for places that have no worker, and to which none would come that Ray starts again."""
        if self._settings.workers:
            if not self._crews:
                self._start(self._settings.workers, ())
            return
        places = {node: self._room_at(has) for node, has in nodes.items()}
        missing = sum(places.values()) - self.size
        new = [node for node, room in places.items() if room and node not in self._nodes]
        if missing > 0:
            self._nodes |= set(new)
            self._start(missing, new)

    def _room_at(self, resources: Mapping[str, float]) -> int:
        """How many workers a node is to have."""
        cpus, gpus = self._settings.cpus, self._settings.gpus
        by_cpus = _times(resources.get("CPU", 0), cpus) if cpus else 1_000_000
        return min(by_cpus, _times(resources.get("GPU", 0), gpus) if gpus else 1)

    def _start(self, size: int, nodes: Sequence[str]) -> None:
        number = len(self._crews)
        flow = _ray_data(self._order, self._hub, number, size, nodes)
        thread = threading.Thread(target=self._take_all, args=(flow,), daemon=True)
        self._crews.append(_Crew(number, size, thread))
        thread.start()

    def _take_all(self, flow: Any) -> None:
        """In a thread: take what comes out of a flow until it ends."""
        why = "it ended"
        try:
            for bundle in flow.iter_internal_ref_bundles():
                for block in bundle.blocks:
                    self._loop.call_soon_threadsafe(self._fetch, block.ref)
        except Exception as error:
            why = one_line(error)[:300]
        if not self._closes:
            failure = Stopped(f"create: Ray Data cannot go on ({why}); the same command goes on from here")
            self._loop.call_soon_threadsafe(self._fail, failure)

    def _fetch(self, block: Any) -> None:
        """Have a block taken when it is here, which one that was lost with its node may never be."""
        task = asyncio.create_task(self._take(block))
        self._taking.add(task)
        task.add_done_callback(self._taking.discard)

    async def _take(self, block: Any) -> None:
        try:
            rows = (await block).to_pylist()
        except _ray().exceptions.RayError:  # others make its rows
            return
        for row in rows:
            worker, made = pickle.loads(row["made"])
            due = self._due.get(row["number"])
            if due is None or due.made.done():  # another worker was faster
                continue
            if not isinstance(made, Exception):
                self._ends = 0
                due.made.set_result(made)
            elif await hub_answer(self._hub.beat.remote(worker)):
                due.made.set_exception(made)
            else:  # it was out of reach
                await self._offer_again([row["number"]])

    def _why_none(self) -> str:
        needs = f"{self._settings.cpus:g} CPU and {self._settings.gpus:g} GPU (create.ray.cpus and gpus)"
        if self._why:
            return f"create: no worker is left (the last one: {self._why}); the same command goes on from here"
        if not self._crews:
            return f"create: no node of the Ray cluster has the {needs} that a worker takes; see `ray status`"
        return (
            f"create: no worker could start in {self._settings.wait_seconds:g} s (create.ray.wait_seconds); each takes "
            f"{needs}, see `ray status`"
        )


def _blocks_at_once(settings: RaySettings) -> int:
    """Of a worker."""
    return max(1, min(BLOCKS_OF_A_WORKER, ROWS_OF_A_WORKER // settings.rows_per_block))


def _ray_data(order: Order, hub: Any, crew: int, size: int, nodes: Sequence[str]) -> Any:
    """A Ray Data flow of a crew: rows are blocks of prompts, then blocks of rows, both packed.

    `nodes`: where workers are to start, if there is room; none: wherever there is.
    """
    ray = _ray()
    from anchored.create.ray_worker import Blocks, RowMaker

    settings = order.settings.ray
    at_once = _blocks_at_once(settings)
    # Ray Data spreads actors over these; one that starts again may be anywhere
    at_nodes = {
        "label_selector": {"ray.io/node-id": f"in({','.join(nodes)})"},
        "fallback_strategy": [{"label_selector": {}}],
    }
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = 1  # each row goes on by itself
    context.max_consecutive_actor_init_deaths = MOST_ENDS * size
    context._max_num_blocks_in_streaming_gen_buffer = _UNDER_WAY
    context.issue_detectors_config.detectors = []  # rows that take minutes are none
    context.custom_execution_callback_classes = [_Ending]
    context.memory_usage_poll_interval_s = None  # a thread for each block that is made
    with ray.data.DataContext.current(context):
        # beside the hub, and never in one process with the workers, as their settings differ
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        blocks = ray.data.read_datasource(
            Blocks(hub, crew), num_cpus=0, max_calls=1, label_selector=here, override_num_blocks=1
        )
        return blocks.map_batches(
            RowMaker,
            fn_constructor_args=(order, hub, crew),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=settings.cpus,
            num_gpus=settings.gpus,
            compute=ray.data.ActorPoolStrategy(
                size=size,
                max_tasks_in_flight_per_actor=at_once,
                max_concurrent_calls_per_actor=at_once,
                enable_true_multi_threading=True,
            ),
            **(at_nodes if nodes else {}),
        )


class _Ending:
    """Ends the flows of this process, in the thread that runs each: Ray must not be shut down beside it.

    A callback of Ray Data's, made anew for each flow and sent along to workers, so what it knows is the module's.
    """

    _has_come = threading.Event()
    set, clear = _has_come.set, _has_come.clear

    def before_execution_starts(self, executor: Any) -> None: ...

    def on_execution_step(self, executor: Any) -> None:
        if self._has_come.is_set():
            raise RuntimeError("the stage is over")

    def after_execution_succeeds(self, executor: Any) -> None: ...

    def after_execution_fails(self, executor: Any, error: Exception) -> None: ...


def _nodes() -> dict[str, dict[str, float]]:
    """What each node has that is alive."""
    return {node["NodeID"]: node["Resources"] for node in _ray().nodes() if node["Alive"]}


def _times(has: float, needs: float) -> int:
    """How often one fits into the other: 0.1 ten times into 1."""
    return int(has / needs + 1e-9)


def _join(threads: Sequence[threading.Thread], seconds: float) -> None:
    ends = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, ends - time.monotonic()))


def _some(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"


def _blocks(jobs: Iterable[Job], rows: int) -> Iterator[list[Job]]:
    remaining = iter(jobs)
    while block := list(islice(remaining, rows)):
        yield block


def _ray() -> Any:
    try:
        import ray
        import ray.data
        import ray.exceptions
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise RecipeError(f'create.engine: ray cannot be loaded ({error}); pip install "anchored[ray]"') from None
    return ray


def _on(node: str) -> Any:
    return _ray().util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)


@contextmanager
def _silent() -> Iterator[None]:
    """Drops what the process writes to its standard error meanwhile, whatever writes it."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class _connected:
    """Connected to the cluster for the block, or to Ray started here for it."""

    def __init__(self, settings: RaySettings) -> None:
        self._address = settings.address

    def __enter__(self) -> None:
        self._stack = ExitStack()
        with self._stack:
            self._stack.callback(_restore_environment, set(os.environ))
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            # its C++ parts write to this process's terminal, first of all that they were told not to (hence `_silent`)
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
            ray = _ray()
            self._stack.enter_context(_quiet_ray())
            starts = self._address is None and "RAY_ADDRESS" not in os.environ
            more: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 2**28} if starts else {}
            address = "local" if starts else self._address  # else Ray would take a cluster that it finds here
            handler = signal.getsignal(signal.SIGTERM)
            self._stack.callback(ray.shutdown)
            try:
                with _silent():
                    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **more)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise RecipeError(
                    f"create.ray.address: no Ray cluster could be used at {self._address or 'this machine'} "
                    f"({one_line(error)[:300]}); `ray start --head` starts one, null starts one for the stage"
                ) from None
            finally:
                with suppress(ValueError):  # not in the main thread
                    signal.signal(signal.SIGTERM, handler)  # Ray has put its own there
            self._stack = self._stack.pop_all()

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _restore_environment(names: set[str]) -> None:
    """Ray writes down in the environment how it was started, for the next that is started here."""
    for name in [name for name in os.environ if name not in names]:
        del os.environ[name]


@contextmanager
def _quiet_ray() -> Iterator[None]:
    """Ray prints nothing, and does not start itself again when a thread of its own is late."""
    from ray._private import auto_init_hook, worker

    printing, starting = worker.print_to_stdstream, auto_init_hook.enable_auto_connect
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what matters of it comes as an error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"ray\.")
        worker.print_to_stdstream = lambda *_, **__: None
        auto_init_hook.enable_auto_connect = False
        try:
            yield
        finally:
            worker.print_to_stdstream, auto_init_hook.enable_auto_connect = printing, starting
