"""Stores of an older format, and of other machines."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from commands import STUCK_SECONDS, anchored

from anchored.errors import DataError
from anchored.llm.chat import Reply, Request, Usage
from anchored.llm.money import Spending
from anchored.llm.replies import Entry, ReplyStore, request_key
from anchored.records import Message

# made by anchored at format 1: 40 replies of "old-model" to "question N" at max_tokens 64, every fourth one cut
OLD = Path(__file__).with_name("replies_v1.sqlite")


def a_request(number: int, max_tokens: int = 64) -> Request:
    return Request((Message("system", "Be brief."), Message("user", f"question {number}")), 0.5, 0.9, max_tokens, 1, 3)


def a_store(path: Path, numbers: range, *, says: str = "new") -> Path:
    with ReplyStore(path) as store:
        entries = [
            Entry(
                "m", a_request(number), Reply(f"{says} {number}", "stop", "m", usage=Usage(5, 9), raw={"raw": number})
            )
            for number in numbers
        ]
        store.put(entries, [Spending("m", 0.5, "usage")])
    return path


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copy(OLD, tmp_path / "old.sqlite"))


def test_the_old_file_is_of_the_old_format() -> None:
    with sqlite3.connect(f"file:{OLD}?mode=ro&immutable=1", uri=True) as connection:
        assert connection.execute("pragma user_version").fetchone() == (1,)
        assert len(connection.execute("pragma table_info(replies)").fetchall()) == 6


def test_an_old_store_is_brought_up_to_date_and_loses_nothing(old: Path) -> None:
    for _ in range(2):
        with ReplyStore(old) as store:
            assert store.count() == 40
            assert store.spent() == []
            for number in range(40):
                kept = store.get(request_key("old-model", a_request(number)))
                assert kept is not None
                assert (kept.text, kept.usage, kept.raw) == (f"answer {number}", Usage(7, 20), {"number": number})
                longer = store.find("old-model", a_request(number, max_tokens=128))
                assert (longer is None) == (number % 4 == 0)
    with sqlite3.connect(old) as connection:
        assert connection.execute("pragma user_version").fetchone() == (2,)
        assert connection.execute("pragma integrity_check").fetchone() == ("ok",)


def test_old_and_new_stores_are_built_the_same(old: Path, tmp_path: Path) -> None:
    new = a_store(tmp_path / "new.sqlite", range(1))
    with ReplyStore(old):
        pass
    descriptions = []
    for path in (old, new):
        with sqlite3.connect(path) as connection:
            descriptions.append(connection.execute("select type, name, sql from sqlite_master order by 2").fetchall())
    assert descriptions[0] == descriptions[1]


UPGRADE = "import sys; from anchored.llm.replies import ReplyStore; print(ReplyStore(sys.argv[1]).count())"


def test_several_processes_may_open_an_old_store_at_once(old: Path) -> None:
    command = [sys.executable, "-c", UPGRADE, str(old)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        out, errors = process.communicate(timeout=STUCK_SECONDS)
        assert out.strip() == "40", errors


def test_an_upgrade_that_is_killed_begins_anew(old: Path) -> None:
    with sqlite3.connect(old) as connection:
        connection.execute(
            "insert into replies with recursive n(i) as (select 1 union all select i + 1 from n where i < 20000) "
            "select key || i, model, request, reply, raw, created from replies, n where rowid <= 2"
        )
    with subprocess.Popen([sys.executable, "-c", UPGRADE, str(old)]) as process:
        log = Path(f"{old}-wal")
        while process.poll() is None and (not log.exists() or not log.stat().st_size):
            time.sleep(0.001)
        time.sleep(0.1)
        process.kill()
    with ReplyStore(old) as store:
        assert store.count() == 40_040
        assert store.find("old-model", a_request(1, max_tokens=128)) is not None


def test_a_merge_adds_what_is_new_and_the_first_stays(tmp_path: Path) -> None:
    into = a_store(tmp_path / "into.sqlite", range(10), says="first")
    other = a_store(tmp_path / "other.sqlite", range(5, 20), says="second")
    before = other.read_bytes()
    with ReplyStore(into) as store:
        merged = store.merge(other)
        assert (merged.added, merged.known) == (10, 5)
        assert store.count() == 20
        for number in range(20):
            kept = store.get(request_key("m", a_request(number)))
            assert kept is not None
            assert kept.text == f"{'first' if number < 10 else 'second'} {number}"
            assert kept.raw == {"raw": number}
        assert store.find("m", a_request(15, max_tokens=999)) is not None
        assert store.spent() == [Spending("m", 0.5, "usage")]  # its own alone
        again = store.merge(other)
        assert (again.added, again.known) == (0, 15)
        store.put([Entry("m", a_request(99), Reply("after", "stop", "m"))])
    assert other.read_bytes() == before


def test_an_old_store_may_be_merged_and_stays_old(old: Path, tmp_path: Path) -> None:
    with ReplyStore(tmp_path / "into.sqlite") as store:
        assert store.merge(old).added == 40
        assert store.find("old-model", a_request(1, max_tokens=128)) is not None
        assert store.find("old-model", a_request(4, max_tokens=128)) is None
    with sqlite3.connect(old) as connection:
        assert connection.execute("pragma user_version").fetchone() == (1,)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "no store of replies to merge"),
        (lambda path: path.mkdir(), "no store of replies to merge"),
        (lambda path: path.write_bytes(b"not a database, " * 500), "damaged"),
        (lambda path: sqlite3.connect(path).execute("create table songs (name)"), "none of replies"),
        (lambda path: path.touch(), "none of replies"),
        (lambda path: sqlite3.connect(path).execute("pragma user_version = 9"), "later version"),
    ],
    ids=["missing", "folder", "text", "songs", "empty", "later"],
)
def test_what_cannot_be_merged_is_named_and_changes_nothing(
    tmp_path: Path, make: Callable[[Path], object], says: str
) -> None:
    other = tmp_path / "other.sqlite"
    make(other)
    with ReplyStore(a_store(tmp_path / "into.sqlite", range(3))) as store:
        with pytest.raises(DataError, match=says) as raised:
            store.merge(other)
        assert str(other) in str(raised.value)
        assert "\n" not in str(raised.value)
        with pytest.raises(DataError, match="is the store itself"):
            store.merge(store.path)
        assert store.count() == 3
        store.put([Entry("m", a_request(99), Reply("after", "stop", "m"))])


def test_the_command_merges_runs_and_files(tmp_path: Path) -> None:
    a_store(tmp_path / "run" / "replies.sqlite", range(5))
    a_store(tmp_path / "machine-2" / "replies.sqlite", range(3, 9))
    a_store(tmp_path / "loose.sqlite", range(20, 22))
    done = anchored("merge-replies", tmp_path / "run", tmp_path / "machine-2", tmp_path / "loose.sqlite")
    assert done.code == 0, done.err
    assert "machine-2/replies.sqlite: 4 replies added, 2 known already" in done.out
    assert "loose.sqlite: 2 replies added, 0 known already" in done.out
    with ReplyStore(tmp_path / "run" / "replies.sqlite") as store:
        assert store.count() == 11
    failed = anchored("merge-replies", tmp_path / "run", tmp_path / "nowhere")
    assert failed.code == 2
    assert "nowhere/replies.sqlite: there is no store of replies to merge" in failed.err


def _torn(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[60_000:90_000] = random.Random(0).randbytes(30_000)
    path.write_bytes(content)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def _scratched(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("update replies set reply = substr(reply, 1, 20) where rowid % 10 = 0")


@pytest.mark.parametrize("damage", [_torn, _cut, _scratched])
def test_a_merge_saves_what_can_be_read_of_a_damaged_store(damage: Callable[[Path], None], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.sqlite"
    said = {number: f"{number}: " + "x" * 500 for number in range(300)}
    with ReplyStore(damaged) as store:
        store.put([Entry("m", a_request(number), Reply(text, "stop", "m")) for number, text in said.items()])
    damage(damaged)
    before = damaged.read_bytes()
    with ReplyStore(tmp_path / "saved.sqlite") as saved:
        merged = saved.merge(damaged)
        assert merged.damaged
        assert 150 < merged.added == saved.count() < 300
        found = {number: saved.get(request_key("m", a_request(number))) for number in said}
        assert sum(reply is not None for reply in found.values()) == merged.added
        assert all(reply is None or reply.text == said[number] for number, reply in found.items())
        again = saved.merge(damaged)
        assert (again.added, again.known, again.damaged) == (0, merged.added, True)
    assert damaged.read_bytes() == before
