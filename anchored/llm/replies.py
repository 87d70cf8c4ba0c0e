"""The store of replies: what was paid for once is never paid for again, and what was paid is known.

One SQLite file per run; one row per reply, keyed by the content of its request, in JSON columns that any tool reads
(`sqlite3 replies.sqlite "select json_extract(reply, '$.text') from replies"`). A reply is on the disk before anyone
gets it, and with it what was spent until then. Several processes may share the file, on a disk of this machine:
SQLite's log does not work on network disks. Stores of several machines are merged (`ReplyStore.merge`).
"""

from __future__ import annotations

import asyncio
import json
import shlex
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Any, Protocol

from anchored.errors import DataError
from anchored.llm.chat import Chat, Reply, Request, Usage
from anchored.llm.money import Purse, Spending
from anchored.llm.salvage import readable_rows
from anchored.llm.stops import cut_at_stop
from anchored.records import content_hash
from anchored.runs import one_line

VERSION = 2
REPLIES = (
    "create table replies (key text primary key, model text not null, request text not null, reply text not null, "
    "raw text not null, created text not null)"
)
# what version 2 added; older stores get it when they are opened
SPENDING = "create table spending (model text not null, usd real not null, basis text not null, created text not null)"
# what joined later still and no older release misses
COUNTED = "create table if not exists counted (name text primary key)"
OPEN_ENDED = (
    "alter table replies add column open_key text",
    "alter table replies add column max_tokens integer",
    "update replies set open_key = open_key(model, request), max_tokens = json_extract(request, '$.max_tokens')",
    "create index replies_open_key on replies (open_key)",
)
COLUMNS = "key, model, request, reply, raw, created, open_key, max_tokens"
_INSERT = f"insert into main.replies ({COLUMNS}) values (?, ?, ?, ?, ?, ?, ?, ?) on conflict do nothing"
_SPEND = "insert into spending values (?, ?, ?, ?)"
_IS_JSON = "(json_valid(request) and json_valid(reply) and json_valid(raw))"
StoredRow = tuple[str | int, ...]
"""The cells of a row, in the order of `COLUMNS`."""
_LATER = {"top_logprobs", "logprobs", "stop"}
"""Fields that requests and replies did not have at first."""
OTHER_PROCESS_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Entry:
    """A reply, and what was asked of whom."""

    fingerprint: str
    request: Request
    reply: Reply


@dataclass(frozen=True, slots=True)
class Merged:
    """What came of another store."""

    added: int
    known: int
    """Replies to requests that had one here already."""
    damaged: bool = False
    """Whether the other file holds more, which cannot be read."""


class ReplyStore:
    """Replies by request, in a file that is made when it is missing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.failure = ""
        """Why it takes no more replies: nothing should be paid for then."""
        self._writing = threading.Lock()
        with self._named_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # one connection reads while the other waits for the disk in a thread of its own
            self._writer = self._connect()
            self._reader = self._connect()
            self._prepare()

    def get(self, key: str) -> Reply | None:
        """The whole reply to the request with this key."""
        with self._named_errors():
            found = self._select("reply, raw", key)
            return replace(_reply(found[0]), raw=json.loads(found[1])) if found else None

    def get_without_raw(self, key: str) -> Reply | None:
        """The reply with `raw` left on the disk: a tenth of the memory, for those who keep many."""
        with self._named_errors():
            found = self._select("reply", key)
            return _reply(found[0]) if found else None

    def __contains__(self, key: str) -> bool:
        with self._named_errors():
            return self._select("1", key) is not None

    def find(self, fingerprint: str, request: Request) -> Reply | None:
        """The reply to a request, without `raw`: its own, or one to the same with another `max_tokens`.

        A text that ended by itself is the same under every limit that it does not reach, for a model does not know its
        limit. So raising `max_tokens` asks again only what was cut. Not so a text that was cut, one that is longer than
        the limit now, or one of unknown length where the limit is lower now. Where several would do, the one with the
        highest limit is given. A whole text serves where it is now to end at a stop string.
        """
        if own := self.get_without_raw(request_key(fingerprint, request)):
            return own
        with self._named_errors():
            found = self._reader.execute(
                "select max_tokens, reply from replies where open_key = ? order by max_tokens desc, rowid",
                (_open_key(fingerprint, request),),
            ).fetchall()
            others = [(max_tokens, _reply(text)) for max_tokens, text in found]
        for max_tokens, reply in others:
            if reply.finish_reason == "stop" and (
                max_tokens <= request.max_tokens or 0 < reply.usage.completion_tokens < request.max_tokens
            ):
                return reply
        whole = self.find(fingerprint, replace(request, stop=())) if request.stop else None
        return cut_at_stop(whole, request.stop) if whole else None

    def put(self, entries: Sequence[Entry], spendings: Sequence[Spending] = ()) -> None:
        """Keep replies and what was spent, all or none; they are on the disk when this returns.

        The first reply to a request stays.
        """
        self.put_rows((stored_row(entry) for entry in entries), spendings)  # one at a time: a reply may be megabytes

    def put_rows(self, rows: Iterable[StoredRow], spendings: Sequence[Spending] = ()) -> None:
        """The same with replies as they are stored, here or on another machine."""
        now = _now()
        with self._writing, self._named_errors(), self._transaction():
            self._writer.executemany(_INSERT, rows)
            self._writer.executemany(_SPEND, [_spent_row(spending, now) for spending in spendings])

    def count_once(self, name: str, spending: Spending) -> bool:
        """Keep what was spent on what has this name, unless that was done before; whether it was not.

        For what may be counted again after a kill: the name is kept in the same transaction.
        """
        with self._writing, self._named_errors(), self._transaction():
            new = self._writer.execute("insert into counted values (?) on conflict do nothing", (name,)).rowcount
            if new:
                self._writer.execute(_SPEND, _spent_row(spending, _now()))
        return bool(new)

    async def look_up(self, fingerprint: str, request: Request) -> Reply | None:
        """`find`, as a `Replies`."""
        return self.find(fingerprint, request)

    async def keep(self, entries: Sequence[Entry], purse: Purse | None = None) -> None:
        """Keep replies, and what `purse` has spent since the last time; they are on the disk when this returns."""
        await self._keep(lambda spendings: self.put(entries, spendings), bool(entries), purse)

    async def keep_rows(self, rows: Sequence[StoredRow], purse: Purse | None = None) -> None:
        """The same with replies as they are stored."""
        await self._keep(lambda spendings: self.put_rows(rows, spendings), bool(rows), purse)

    async def _keep(self, put: Callable[[list[Spending]], None], has_replies: bool, purse: Purse | None) -> None:
        spendings = purse.take_unlisted() if purse else []
        if not has_replies and not spendings:
            return
        try:
            await asyncio.to_thread(put, spendings)
        except Exception:
            if purse:
                purse.list_again(spendings)
            raise

    def keys(self, most: int) -> list[str]:
        """The keys of the oldest replies."""
        with self._named_errors():
            return [key for (key,) in self._reader.execute("select key from replies order by rowid limit ?", (most,))]

    def rows(self, keys: Sequence[str]) -> list[StoredRow]:
        """The replies with these keys as they are stored, for `put_rows` of another store."""
        with self._named_errors():
            select = f"select {COLUMNS} from replies where key = ?"
            return [row for key in keys for row in self._reader.execute(select, (key,))]

    def remove(self, keys: Sequence[str]) -> None:
        """Let go of replies that another store has."""
        with self._writing, self._named_errors(), self._transaction():
            self._writer.executemany("delete from replies where key = ?", [(key,) for key in keys])

    def spent(self) -> list[Spending]:
        """What was spent on this store's own requests, summed up by model and basis."""
        with self._named_errors():
            sums = self._reader.execute("select model, sum(usd), basis from spending group by model, basis")
            return [Spending(*row) for row in sums]

    def merge(self, path: str | Path) -> Merged:
        """Add the replies of another store, which stays as it is; the first reply to a request stays.

        What they cost was spent elsewhere, and is no spending of this store's run.
        """
        other = Path(path)
        if not other.is_file():
            raise DataError(f"{other}: there is no store of replies to merge")
        if other.samefile(self.path):
            raise DataError(f"{other}: is the store itself; name another to merge into it")
        with self._writing, self._named_errors(other):
            try:
                return self._merge_whole(other)
            except (sqlite3.DatabaseError, ValueError) as error:
                if not _is_damage(error):
                    raise
                merged = self._merge_readable(other)
                if not merged.added + merged.known:
                    raise
                return merged

    def _merge_whole(self, other: Path) -> Merged:
        self._writer.execute("attach database ? as other", (str(other),))
        try:
            _check_version(self._writer, other, "other")
            with self._transaction():
                self._writer.execute(
                    f"insert into main.replies ({COLUMNS}) select key, model, request, reply, raw, created, "
                    "open_key(model, request), json_extract(request, '$.max_tokens') from other.replies "
                    f"where {_IS_JSON} order by rowid on conflict do nothing"
                )
                added = self._writer.execute("select changes()").fetchone()[0]
                counts = f"select count(*), total({_IS_JSON}) from other.replies"
                total, whole = self._writer.execute(counts).fetchone()
        finally:
            self._writer.execute("detach database other")
        return Merged(added, int(whole) - added, damaged=whole < total)

    def _merge_readable(self, other: Path) -> Merged:
        """Of a damaged store, the replies that are whole."""
        added = known = 0
        with self._transaction():
            for row in readable_rows(other, "replies", ("key", "model", "request", "reply", "raw", "created")):
                try:
                    whole = _whole_row(row)
                except (ValueError, TypeError, LookupError, AttributeError):
                    continue
                self._writer.execute(_INSERT, whole)
                new = self._writer.execute("select changes()").fetchone()[0]
                added, known = added + new, known + 1 - new
        return Merged(added, known, damaged=True)

    def remember(self, chat: Chat, purse: Purse | None = None) -> Remembered:
        """The same chat, which asks only what is not in the store; what `purse` spends is kept with the replies."""
        return Remembered(self, chat, purse)

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
        return self._reader.execute(f"select {columns} from replies where key = ?", (key,)).fetchone()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=OTHER_PROCESS_SECONDS, isolation_level=None, check_same_thread=False
        )
        connection.execute("pragma journal_mode = wal")
        connection.execute("pragma synchronous = full")
        connection.create_function("open_key", 2, _open_key_of_row, deterministic=True)
        return connection

    def _prepare(self) -> None:
        """Make the tables in a new file, bring an older one up to date, refuse a file of another kind."""
        with self._transaction():
            version = self._writer.execute("pragma user_version").fetchone()[0]
            tables = self._writer.execute("select count(*) from sqlite_master").fetchone()[0]
            if version == 0 and not tables:
                self._writer.execute(REPLIES)
                version = 1
            else:
                _check_version(self._writer, self.path)
            if version == 1:
                for statement in (*OPEN_ENDED, SPENDING, f"pragma user_version = {VERSION}"):
                    self._writer.execute(statement)
            self._writer.execute(COUNTED)

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
    def _named_errors(self, other: Path | None = None) -> Iterator[None]:
        """SQLite's and the disk's errors as DataErrors that name the file and the way out: `other`, or this one."""
        try:
            yield
        except (sqlite3.Error, OSError, ValueError) as error:
            path = self.path if other is None or _is_of_the_disk(error) else other
            raise DataError(f"{path}: {_what_to_do(path, error)}") from None


class Replies(Protocol):
    """Where replies are kept: the store of this process, or one that several share (`shared`)."""

    failure: str

    async def look_up(self, fingerprint: str, request: Request) -> Reply | None: ...

    async def keep(self, entries: Sequence[Entry], purse: Purse | None = None) -> None: ...


class Remembered:
    """A chat behind the store: asks what is not there, keeps what it gets, and asks once what is asked twice at a time.

    Its replies come without `raw`, which stays in the store. A reply's failure is not kept.
    """

    def __init__(self, store: Replies, chat: Chat, purse: Purse | None = None) -> None:
        self.name = chat.name
        self.fingerprint = chat.fingerprint
        self.purse = purse
        """The run's money, where it is counted."""
        self.hits = 0
        """Replies given without a call."""
        self.asked = 0
        """Calls made."""
        self._store = store
        self._chat = chat
        self._calls: dict[str, _Call] = {}
        self._unwritten: list[tuple[Entry, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether anything that was asked is not answered yet."""
        return bool(self._calls)

    async def reply(self, request: Request) -> Reply:
        key = request_key(self.fingerprint, request)
        call = self._calls.get(key)
        if call is None and (kept := await self._store.look_up(self.fingerprint, request)):
            self.hits += 1
            return kept
        call = call or self._calls.get(key)  # a store that is elsewhere takes its time, in which another may have asked
        if call is None:
            self.asked += 1
            call = self._calls[key] = _Call(asyncio.create_task(self._ask(request)))
            call.task.add_done_callback(lambda _: self._calls.pop(key))
        else:
            self.hits += 1
        try:
            return await call.result()
        except asyncio.CancelledError:
            if self._store.failure and call.task.cancelled():  # by `_end`, perhaps before it had begun
                raise DataError(self._store.failure) from None
            raise

    async def close(self) -> None:
        await self._chat.close()
        if self._writer:
            await self._writer
        await self._store.keep([], self.purse)  # what attempts cost that ended without a reply

    async def _ask(self, request: Request) -> Reply:
        if self._store.failure:
            raise DataError(self._store.failure)
        reply = await self._chat.reply(request)
        await self._keep(Entry(self.fingerprint, request, reply))
        return replace(reply, raw={})

    async def _keep(self, entry: Entry) -> None:
        """Returns when it is on the disk."""
        written = asyncio.get_running_loop().create_future()
        self._unwritten.append((entry, written))
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())
        await written

    async def _write(self) -> None:
        """Write together what gathers while the disk is busy: one wait for the disk serves many replies."""
        while self._unwritten:
            batch, self._unwritten = self._unwritten, []
            error = None
            try:
                await self._store.keep([entry for entry, _ in batch], self.purse)
            except Exception as raised:
                error = raised
            for _, written in batch:
                if not written.done():  # else nobody waits for it any more
                    written.set_exception(error) if error else written.set_result(None)
            if error:
                self._end(error)
        self._writer = None

    def _end(self, error: Exception) -> None:
        """What comes now cannot be kept, and those who wait for their turn must not be sent: it would be paid for."""
        self._store.failure = self._store.failure or str(error)
        for call in self._calls.values():
            call.task.cancel()


def request_key(fingerprint: str, request: Request) -> str:
    """The key of a request to a chat: the hash of all that determines the reply.

    A field that joins `Request` later enters only where it differs from its default, or every store would be lost.
    """
    return _key(fingerprint, request, request.max_tokens)


def _open_key(fingerprint: str, request: Request) -> str:
    """The key of a request but for its `max_tokens`."""
    return _key(fingerprint, request, None)[:32]


def _key(fingerprint: str, request: Request, max_tokens: int | None) -> str:
    turns = [[message.role, message.content] for message in request.messages]
    sampling = [float(request.temperature), float(request.top_p), max_tokens]
    later: list[Any] = [request.top_logprobs] if request.top_logprobs else []
    later += [["stop", *request.stop]] if request.stop else []
    return content_hash([fingerprint, turns, *sampling, request.index, request.seed, *later])


def _open_key_of_row(fingerprint: str, request: str) -> str:
    return _open_key(fingerprint, _request(request))


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


def stored_row(entry: Entry) -> StoredRow:
    """A reply as it is stored, now."""
    reply = _fields(entry.reply)
    raw = reply.pop("raw")
    return (
        request_key(entry.fingerprint, entry.request),
        entry.fingerprint,
        json.dumps(entry.request, default=_fields),
        json.dumps(reply, default=_fields),
        json.dumps(raw),
        _now(),
        _open_key(entry.fingerprint, entry.request),
        entry.request.max_tokens,
    )


def _spent_row(spending: Spending, created: str) -> tuple[str, float, str, str]:
    return spending.model, spending.usd, spending.basis, created


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _whole_row(cells: tuple[bytes, ...]) -> StoredRow:
    """A row of a damaged store with what is made of it; raises where it is not what was written."""
    row = tuple(cell.decode() for cell in cells)
    key, model, text, reply, raw, _ = row
    request = _request(text)
    if key != request_key(model, request):
        raise ValueError("another request")
    _reply(reply)
    json.loads(raw)
    return (*row, _open_key(model, request), request.max_tokens)


def _request(text: str) -> Request:
    stored = json.loads(text)
    return Request.from_json(stored["messages"], stored)


def _fields(record: Any) -> dict[str, Any]:
    """A dataclass as a dict, one level deep: `asdict` copies whole conversations.

    What joined it later is left out where it is not set, so that the rows of a version's stores are alike.
    """
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: value for name, value in values.items() if value or name not in _LATER}


def _reply(text: str) -> Reply:
    try:
        stored = json.loads(text)
        told = tuple(stored.get("logprobs", ()))
        return Reply(**{**stored, "usage": Usage(**stored["usage"]), "logprobs": told})
    except (ValueError, TypeError, LookupError) as error:  # SQLite does not see what is wrong within a cell
        raise ValueError(f"a reply cannot be read: {one_line(error)}") from None


def _check_version(connection: sqlite3.Connection, path: Path, schema: str = "main") -> None:
    """Refuse a database that is no store of replies, or a later version's."""
    version = connection.execute(f"pragma {schema}.user_version").fetchone()[0]
    if version > VERSION:
        raise DataError(
            f"{path}: its replies were written by a later version of anchored (format {version}, this one reads "
            f"{VERSION}); upgrade, or move the file aside to ask everything again"
        )
    if version < 1:
        raise DataError(f"{path}: a database, but none of replies; move it aside or choose another folder")


def _what_to_do(path: Path, error: Exception) -> str:
    name = getattr(error, "sqlite_errorname", "")
    reason = one_line(error).partition(" with text ")[0]  # what is no text is nothing to show
    if _is_damage(error):
        command = shlex.join(("anchored", "merge-replies", "saved.sqlite", str(path)))
        return (
            f"the store of replies is damaged ({reason}); move it aside, with its -wal and -shm, and its replies are "
            f"asked again; `{command}` saves what can be read, to put in its place"
        )
    if _is_of_the_disk(error):
        return f"the disk takes no more ({reason}); make room, then the same command goes on: what is stored is safe"
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return f"another process has held this store for {OTHER_PROCESS_SECONDS:.0f} s; wait until it ends"
    return f"the store of replies cannot be used ({reason}); put the run where you may write, on a disk of this machine"


def _is_damage(error: Exception) -> bool:
    name = getattr(error, "sqlite_errorname", "")
    unreadable = isinstance(error, ValueError) or str(error).startswith("Could not decode")
    return name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) or unreadable


def _is_of_the_disk(error: Exception) -> bool:
    name = getattr(error, "sqlite_errorname", "")
    return name.startswith(("SQLITE_FULL", "SQLITE_IOERR")) or getattr(error, "errno", None) in (ENOSPC, EDQUOT)
