"""The store of replies: what was paid for once is never paid for again.

One SQLite file per run; one row per reply, keyed by the content of its request, in JSON columns that any tool reads
(`sqlite3 replies.sqlite "select json_extract(reply, '$.text') from replies"`). A reply is on the disk before anyone
gets it. Several processes may share the file, on a disk of this machine: SQLite's log does not work on network disks.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from errno import EDQUOT, ENOSPC
from pathlib import Path

from anchored.errors import DataError
from anchored.llm.chat import Chat, Reply, Request, Usage
from anchored.records import content_hash
from anchored.runs import one_line

VERSION = 1
TABLE = (
    "create table replies (key text primary key, model text not null, request text not null, reply text not null, "
    "raw text not null, created text not null)"
)
OTHER_PROCESS_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Entry:
    """A reply, and what was asked of whom."""

    fingerprint: str
    request: Request
    reply: Reply


class ReplyStore:
    """Replies by key, in a file that is made when it is missing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._writing = threading.Lock()
        with self._named_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # one connection reads while the other waits for the disk in a thread of its own
            self._writer = self._connect()
            self._reader = self._connect()
            self._prepare()

    def get(self, key: str) -> Reply | None:
        """The whole reply to the request with this key."""
        found = self._select("reply, raw", key)
        return replace(_reply(found[0]), raw=json.loads(found[1])) if found else None

    def get_without_raw(self, key: str) -> Reply | None:
        """The reply with `raw` left on the disk: a tenth of the memory, for those who keep many."""
        found = self._select("reply", key)
        return _reply(found[0]) if found else None

    def put(self, entries: Sequence[Entry]) -> None:
        """Keep replies, all of them or none; they are on the disk when this returns. The first of a key stays."""
        rows = [_row(entry) for entry in entries]
        with self._writing, self._named_errors(), self._transaction():
            self._writer.executemany("insert into replies values (?, ?, ?, ?, ?, ?) on conflict do nothing", rows)

    def remember(self, chat: Chat) -> Remembered:
        """The same chat, which asks only what is not in the store."""
        return Remembered(self, chat)

    def close(self) -> None:
        """Let go of the file; idempotent."""
        with self._writing, self._named_errors():
            self._reader.close()
            self._writer.close()

    def __enter__(self) -> ReplyStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def count(self) -> int:
        """How many replies are kept."""
        with self._named_errors():
            return self._reader.execute("select count(*) from replies").fetchone()[0]

    def _select(self, columns: str, key: str) -> tuple[str, ...] | None:
        with self._named_errors():
            return self._reader.execute(f"select {columns} from replies where key = ?", (key,)).fetchone()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=OTHER_PROCESS_SECONDS, isolation_level=None, check_same_thread=False
        )
        connection.execute("pragma journal_mode = wal")
        connection.execute("pragma synchronous = full")
        return connection

    def _prepare(self) -> None:
        """Make the table in a new file, refuse a file of another kind."""
        with self._transaction():
            version = self._writer.execute("pragma user_version").fetchone()[0]
            tables = self._writer.execute("select count(*) from sqlite_master").fetchone()[0]
            if version == 0 and not tables:
                self._writer.execute(TABLE)
                self._writer.execute(f"pragma user_version = {VERSION}")
            elif version > VERSION:
                raise DataError(
                    f"{self.path}: its replies were written by a later version of anchored (format {version}, this "
                    f"one reads {VERSION}); upgrade, or move the file aside to ask everything again"
                )
            elif version != VERSION:
                raise DataError(f"{self.path}: a database, but none of replies; move it aside or choose another folder")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._writer.execute("begin immediate")
        try:
            yield
        except BaseException:
            if self._writer.in_transaction:  # a full disk has already rolled it back
                self._writer.rollback()
            raise
        self._writer.commit()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """SQLite's and the disk's errors as DataErrors that name the file and the way out."""
        try:
            yield
        except (sqlite3.Error, OSError, ValueError) as error:
            raise DataError(f"{self.path}: {_what_to_do(self.path, error)}") from None


class Remembered:
    """A chat behind the store: asks what is not there, keeps what it gets, and asks once what is asked twice at a time.

    Its replies come without `raw`, which stays in the store. A reply's failure is not kept.
    """

    def __init__(self, store: ReplyStore, chat: Chat) -> None:
        self.name = chat.name
        self.fingerprint = chat.fingerprint
        self.hits = 0
        """Replies given without a call."""
        self.asked = 0
        """Calls made."""
        self._store = store
        self._chat = chat
        self._calls: dict[str, _Call] = {}
        self._unwritten: list[tuple[Entry, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None

    async def reply(self, request: Request) -> Reply:
        key = request_key(self.fingerprint, request)
        call = self._calls.get(key)
        if call is None and (kept := self._store.get_without_raw(key)):
            self.hits += 1
            return kept
        if call is None:
            self.asked += 1
            call = self._calls[key] = _Call(asyncio.create_task(self._ask(request)))
            call.task.add_done_callback(lambda _: self._calls.pop(key))
        else:
            self.hits += 1
        return await call.result()

    async def close(self) -> None:
        await self._chat.close()

    async def _ask(self, request: Request) -> Reply:
        reply = await self._chat.reply(request)
        written = asyncio.get_running_loop().create_future()
        self._unwritten.append((Entry(self.fingerprint, request, reply), written))
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())
        await written
        return replace(reply, raw={})

    async def _write(self) -> None:
        """Write together what gathers while the disk is busy: one wait for the disk serves many replies."""
        while self._unwritten:
            batch, self._unwritten = self._unwritten, []
            error = None
            try:
                await asyncio.to_thread(self._store.put, [entry for entry, _ in batch])
            except Exception as raised:
                error = raised
            for _, written in batch:
                if not written.done():  # else nobody waits for it any more
                    written.set_exception(error) if error else written.set_result(None)
        self._writer = None


def request_key(fingerprint: str, request: Request) -> str:
    """The key of a request to a chat: the hash of all that determines the reply.

    A field that joins `Request` later enters only where it differs from its default, or every store would be lost.
    """
    turns = [[message.role, message.content] for message in request.messages]
    sampling = [float(request.temperature), float(request.top_p), request.max_tokens]
    return content_hash([fingerprint, turns, *sampling, request.index, request.seed])


class _Call:
    """A call under way that several wait for; it ends when the last of them is cancelled."""

    def __init__(self, task: asyncio.Task[Reply]) -> None:
        self.task = task
        self._waiting = 0

    async def result(self) -> Reply:
        self._waiting += 1
        try:
            return await asyncio.shield(self.task)
        finally:
            self._waiting -= 1
            if not self._waiting:
                self.task.cancel()


def _row(entry: Entry) -> tuple[str, ...]:
    reply = asdict(replace(entry.reply, raw={}))
    del reply["raw"]
    return (
        request_key(entry.fingerprint, entry.request),
        entry.fingerprint,
        json.dumps(asdict(entry.request)),
        json.dumps(reply),
        json.dumps(entry.reply.raw),
        datetime.now(UTC).isoformat(timespec="milliseconds"),
    )


def _reply(text: str) -> Reply:
    fields = json.loads(text)
    return Reply(**{**fields, "usage": Usage(**fields["usage"])})


def _what_to_do(path: Path, error: Exception) -> str:
    name = getattr(error, "sqlite_errorname", "")
    reason = one_line(error)
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) or isinstance(error, ValueError):
        return (
            f"the store of replies is damaged ({reason}); move it aside and its replies are asked again, or save what "
            f"can be read with `sqlite3 {path} .recover | sqlite3 saved.sqlite` and put that in its place"
        )
    if name.startswith(("SQLITE_FULL", "SQLITE_IOERR")) or getattr(error, "errno", None) in (ENOSPC, EDQUOT):
        return f"the disk takes no more ({reason}); make room, then the same command goes on: what is stored is safe"
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return f"another process has held this store for {OTHER_PROCESS_SECONDS:.0f} s; wait until it ends"
    return f"the store of replies cannot be used ({reason}); put the run where you may write, on a disk of this machine"
