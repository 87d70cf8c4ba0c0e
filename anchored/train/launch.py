"""Starting the ranks of one machine, or taking part in those that a launcher (`torchrun`) started.

In: work that takes a Progress and its Ranks. Out: it was done by all of them, or one error was raised, once. The work
itself, and what goes between ranks while they do it, is not here; nor is torch, until ranks are there.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from anchored.errors import AnchoredError, Stopped
from anchored.progress import Progress, Silent

if TYPE_CHECKING:
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

    from anchored.train.ranks import Ranks

Work = Callable[[Progress, "Ranks"], None]

_LAUNCHER_SETS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SECONDS_TO_END = 10.0
_SECONDS_TO_EXPLAIN = 3.0
"""How long a rank's failure waits for that of another, which may be its cause."""


def under_launcher() -> bool:
    """Whether this process is one of several that a launcher started."""
    return all(name in os.environ for name in _LAUNCHER_SETS)


def speaks() -> bool:
    """Whether this process writes to the terminal: of several ranks, the first alone does."""
    return not under_launcher() or os.environ["RANK"] == "0"


@contextmanager
def launched(device: str) -> Iterator[Ranks]:
    """This process's place among those of the launcher, on `device` (cpu or cuda); an error is told by one of them."""
    from torch.distributed.rendezvous import rendezvous

    from anchored.train.ranks import Ranks, joined, lost_contact

    rank, count, local_rank, local_count = (int(os.environ[name]) for name in _LAUNCHER_SETS[:4])
    ranks = Ranks(rank, count, local_rank, local_count)
    store, _, _ = next(rendezvous("env://"))
    try:
        with joined(ranks, device, store):
            yield ranks
    except (Exception, KeyboardInterrupt) as error:
        lost = lost_contact(error)
        if lost:
            time.sleep(_SECONDS_TO_EXPLAIN)  # for the one that failed to say why
        if _told(store):
            sys.exit(error.exit_code if isinstance(error, AnchoredError) else Stopped.exit_code)
        if lost:
            raise Stopped(f"rank {rank}: another rank is gone; the same command goes on from here") from error
        raise


def _told(store: Store) -> bool:
    """Whether another rank has told of an error; if not, this one is to."""
    try:
        return store.add("anchored/errors", 1) > 1
    except Exception:  # the store went with the process that kept it
        return not speaks()


def run_ranks(count: int, device: str, work: Work, progress: Progress) -> None:
    """Let `count` new processes of this machine do `work`, which is pickled; the first one's progress is shown here.

    An AnchoredError of any of them is raised here. However this ends, no process is left.
    """
    with tempfile.TemporaryDirectory(prefix="anchored-") as meeting:
        job = _Job(Path(meeting) / "store", count, device, work)
        members = [_start(job, rank) for rank in range(count)]
        try:
            _follow(members, progress)
        finally:
            _end([member.process for member in members])


@dataclass(frozen=True, slots=True)
class _Job:
    store: Path
    """A file that the ranks meet at: there is no port that could be taken, or reached from outside."""
    count: int
    device: str
    work: Work


@dataclass(frozen=True, eq=False, slots=True)
class _Member:
    """A process and what it says: a `_Shown` now and then, at last a `_Done` or an exception."""

    rank: int
    process: BaseProcess
    connection: Connection


@dataclass(frozen=True, slots=True)
class _Shown:
    """A rank's call of its Progress."""

    method: str
    values: tuple[Any, ...]
    facts: dict[str, object]


@dataclass(frozen=True, slots=True)
class _Done:
    """A rank's work is done."""


class _RankLost(Exception):
    """A rank ended because another was gone."""


class _RankFailed(Exception):
    """A fault of ours in a rank, with its traceback."""


def _start(job: _Job, rank: int) -> _Member:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_do, args=(job, rank, theirs), name=f"rank {rank}", daemon=True)
    process.start()
    # the only other end is the process's own, so its death closes the pipe
    theirs.close()
    return _Member(rank, process, ours)


def _follow(members: Sequence[_Member], progress: Progress) -> None:
    """Pass on what the ranks say until all are done, or raise what went wrong."""
    running = list(members)
    failed: Exception | None = None
    until = float("inf")
    while running and (left := until - time.monotonic()) > 0:
        ready = wait([member.connection for member in running], left if failed else None)
        for member in [member for member in running if member.connection in ready]:
            said = _hear(member, progress)
            if said is not None:
                running.remove(member)
            if isinstance(said, AnchoredError):
                raise said
            if isinstance(said, Exception) and (failed is None or isinstance(failed, _RankLost)):
                # perhaps another rank's end was the cause, and is heard of later
                failed, until = said, min(until, time.monotonic() + _SECONDS_TO_EXPLAIN)
    if isinstance(failed, _RankLost):
        raise Stopped(f"{failed}; the same command goes on from here")
    if failed:
        raise failed


def _hear(member: _Member, progress: Progress) -> _Done | Exception | None:
    """Take one message; None while the rank goes on."""
    try:
        said = member.connection.recv()
    except (EOFError, OSError):
        return _death(member)
    if isinstance(said, _Shown):
        getattr(progress, said.method)(*said.values, **said.facts)
        return None
    return said


def _death(member: _Member) -> AnchoredError:
    """What a process that said nothing died of."""
    member.process.join(_SECONDS_TO_END)
    code = member.process.exitcode
    if code is not None and code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
        hint = " (often the machine's memory was full)" if code == -signal.SIGKILL else ""
    else:
        how, hint = f"ended with exit code {code}", ""
    return Stopped(f"rank {member.rank} {how}{hint}; the same command goes on from here")


def _end(processes: Sequence[BaseProcess]) -> None:
    """Let every process end, gently and then not."""
    for process in processes:
        if process.is_alive():
            process.terminate()
    until = time.monotonic() + _SECONDS_TO_END
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _do(job: _Job, rank: int, connection: Connection) -> None:
    """The life of a rank."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its ranks
    signal.signal(signal.SIGTERM, _interrupt)
    Thread(target=_end_with_parent, daemon=True).start()
    _stay_on_this_machine()
    from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

    from anchored.train.ranks import Ranks, joined, lost_contact

    ranks = Ranks(rank, job.count, rank, job.count)
    try:
        with joined(ranks, job.device, FileStore(str(job.store), job.count)):
            job.work(_TellsParent(connection) if ranks.first else Silent(), ranks)
        connection.send(_Done())
    except KeyboardInterrupt:
        pass
    except AnchoredError as error:
        connection.send(error)
    except Exception as error:
        kind = _RankLost if lost_contact(error) else _RankFailed
        text = "another rank is gone" if kind is _RankLost else traceback.format_exc()
        connection.send(kind(f"rank {rank}: {text}"))
    # all is said; the end of an interpreter that ran collectives is where it may still hang or abort
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class _TellsParent:
    """A Progress that tells the parent."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def start(self, task: str, total: int | None, done: int = 0) -> None:
        self._tell("start", task, total, done)

    def advance(self, task: str, by: int = 1, **facts: object) -> None:
        self._tell("advance", task, by, **facts)

    def finish(self, task: str) -> None:
        self._tell("finish", task)

    def note(self, text: str) -> None:
        self._tell("note", text)

    def _tell(self, name: str, *args: object, **facts: object) -> None:
        self._connection.send(_Shown(name, args, facts))


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    """A parent that was killed can end nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _stay_on_this_machine() -> None:
    """Let gloo and NCCL listen on the loopback interface alone, unless the user named another."""
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
