"""A worker of a Ray cluster, and the stream that brings its blocks: what runs on nodes.

Both are parts of a Ray Data flow (`on_ray`): `Blocks` is the source that it reads, `RowMaker` what it maps with.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import stat
import sys
import threading
import traceback
import uuid
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.exceptions
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from anchored.create.desk import Desk
from anchored.create.engine import make_row
from anchored.create.ray_hub import BEAT_SECONDS, Asked, Block, Order, hub_answer, node_store_path
from anchored.errors import AnchoredError, DataError, Stopped
from anchored.llm.ask import work_through
from anchored.llm.replies import ReplyStore
from anchored.llm.shared import Heard, Line, NodeStore, Said, books_of
from anchored.process import settle_environment
from anchored.progress import Silent
from anchored.records import Prompt

log = logging.getLogger(__name__)


class Blocks(Datasource):
    """The blocks that a crew is offered, one row each: `number`, and `prompts` as they are packed."""

    def __init__(self, hub: Any, crew: int) -> None:
        super().__init__()
        self._hub, self._crew = hub, crew

    def get_name(self) -> str:
        return "Prompts"

    def estimate_inmemory_data_size(self) -> None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        hub, crew = self._hub, self._crew

        def read() -> Iterator[pa.Table]:
            reader = uuid.uuid4().hex
            while (blocks := ray.get(hub.next_blocks.remote(crew, reader))) is not None:
                for number, prompts in blocks:
                    yield pa.table({"number": [number], "prompts": [prompts]})

        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(read, unknown)]


class RowMaker:
    """One process on a node: makes the rows of the blocks that come to it, many at once."""

    def __init__(self, order: Order, hub: Any, crew: int) -> None:
        settle_environment()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._life: _Life | None = None
        context = ray.get_runtime_context()
        joined = ray.get(hub.join.remote(context.get_actor_id(), context.get_node_id(), crew, context.current_actor))
        if joined is None:  # all are closing
            return
        name, keys = joined
        threading.Thread(target=_beat, args=(hub, name), daemon=True).start()
        life = _Life(name, order, hub)
        try:
            self._await(life.begin(keys))
            self._life = life
        except Exception as error:  # Ray would start it anew, for ever
            ray.get(hub.fail.remote(name, _portable(error)))

    def __call__(self, block: pa.Table) -> pa.Table:
        """The rows of a block of prompts, packed; none where it is not to be made here."""
        (number,), (packed,) = block["number"].to_pylist(), block["prompts"].to_pylist()
        made = self._await(self._life.make(number, pickle.loads(packed))) if self._life else None
        numbers, rows = ([], []) if made is None else ([number], [pickle.dumps(made)])
        return pa.table({"number": pa.array(numbers, pa.int64()), "made": pa.array(rows, pa.large_binary())})

    def _await(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class _Life:
    """What a worker does, in its event loop."""

    def __init__(self, name: str, order: Order, hub: Any) -> None:
        self._name, self._order, self._hub = name, order, hub
        self._stack = AsyncExitStack()
        self._notes = _Notes(lambda text: hub.tell.remote(name, text))
        self._making: set[asyncio.Task[Any]] = set()
        self._closing: asyncio.Task[None] | None = None
        self._closes = False

    async def begin(self, keys: Mapping[str, str]) -> None:
        """Open the chats."""
        os.environ.update(keys)
        _go_to(self._order.folder)
        logging.getLogger("anchored").addHandler(self._notes.handler)
        self._line = Line(_RayWire(self._hub, self._name))
        self._stack.push_async_callback(self._line.close)
        if store := _node_store(node_store_path(self._order.run)):
            self._stack.push_async_callback(self._leave, store)
            await store.hand_over(self._line)  # what a run left that ended before it could
        books = books_of(self._name, self._line, counts_money=self._order.counts_money, node_store=store)
        self._chats = await self._stack.enter_async_context(self._order.open_chats(books, self._notes))
        self._desk = Desk(self._order.settings, self._chats)
        self._closing = asyncio.create_task(self._close())
        await self._hub.ready.remote(self._name)

    async def make(self, number: int, prompts: Sequence[Prompt]) -> tuple[str, Block | Exception] | None:
        """This worker's name, and the rows of a block or what ends the stage.

        None where others make it, or nobody is to any more.
        """
        if not await self._hub.begins.remote(self._name, number):
            return None
        task = asyncio.current_task()
        assert task
        self._making.add(task)
        try:
            rows = await work_through(prompts, lambda _, prompt: make_row(prompt, self._desk), len(prompts))
        except Exception as error:
            return self._name, _portable(error)
        except asyncio.CancelledError:
            if self._closes:
                return None
            return self._name, Stopped(f"create: {self._name} gave up a row; the same command goes on from here")
        finally:
            self._making.discard(task)
        return self._name, Block(rows, self._counted())

    async def _close(self) -> None:
        """When the time has come: give up what is under way, close the chats and stop their servers."""
        await self._hub.closing.remote()
        self._closes = True
        for task in self._making:
            task.cancel()
        await asyncio.gather(*self._making, return_exceptions=True)
        with suppress(Exception):
            await self._stack.aclose()
        await self._hub.closed.remote(self._name)

    async def _leave(self, store: NodeStore) -> None:
        """Merge what the node has still, and leave no file."""
        await store.hand_over(self._line)
        if store.close():
            for path in store.path.parent.glob(f"{store.path.name}*"):
                path.unlink(missing_ok=True)  # another worker that still has it open hands over what it wrote

    def _counted(self) -> dict[str, Asked]:
        found = {role: Asked(chat.name, chat.asked, chat.hits) for role, chat in self._chats.items()}
        for chat in self._chats.values():
            chat.asked = chat.hits = 0
        return found


def _node_store(path: Path) -> NodeStore | None:
    """The node's store; None where it cannot be had, and the run's own has to do."""
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        folder = path.parent.lstat()
        if folder.st_uid != os.getuid() or not stat.S_ISDIR(folder.st_mode) or folder.st_mode & 0o077:
            raise DataError(f"{path.parent} is not a folder of this user's alone")
        return NodeStore(ReplyStore(path))
    except (DataError, OSError) as error:
        log.warning("replies are kept in the run folder alone, not on this node: %s", error)
        return None


class _RayWire:
    """Carries a worker's words to the hub; `Wire`."""

    def __init__(self, hub: Any, worker: str) -> None:
        self._hub, self._worker = hub, worker

    async def say(self, words: Sequence[Said]) -> None:
        await hub_answer(self._hub.say.remote(self._worker, words))

    async def hear(self) -> list[Heard]:
        return await hub_answer(self._hub.hear.remote(self._worker))


class _Notes(Silent):
    """Passes on what a worker has to say."""

    def __init__(self, tell: Callable[[str], object]) -> None:
        self._tell = tell
        self.handler = logging.Handler(logging.WARNING)
        self.handler.emit = lambda record: self.note(record.getMessage())

    def note(self, text: str) -> None:
        self._tell(text)


def _beat(hub: Any, worker: str) -> None:
    """Tell the hub again and again that this process lives, and end it when nobody waits for it."""
    pause = threading.Event()
    with suppress(ray.exceptions.RayError):
        while ray.get(hub.beat.remote(worker)):
            pause.wait(BEAT_SECONDS)
    os._exit(1)


def _portable(error: Exception) -> Exception:
    """The error as another process can read it."""
    if isinstance(error, AnchoredError):
        return error
    return RuntimeError("".join(traceback.format_exception(error)))


def _go_to(folder: str) -> None:
    """The folder of the command, where this node has it: paths and modules in the recipe are found from there."""
    with suppress(OSError):
        os.chdir(folder)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
