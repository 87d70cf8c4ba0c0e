"""`anchored create` on a disk that is full, and with a store that was damaged: told in a line, nothing lost, and the
same command goes on to the undisturbed run's pairs."""

from __future__ import annotations

import os
import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from forks import Forks
from pocket_creation import KEY, Creation, World, faults, files, made, overrides, undisturbed
from small_disk import small_disk

from anchored.pocket.teacher import Teacher


@pytest.fixture(scope="module")
def whole(forks: Forks, world: World, tmp_path_factory: pytest.TempPathFactory) -> Creation:
    return undisturbed(forks, tmp_path_factory.mktemp("whole"), world, "clair", faults("leak"))


@pytest.fixture
def creation(forks: Forks, world: World, tmp_path: Path) -> Iterator[Creation]:
    with Teacher(faults("leak", "server_error"), api_key=KEY) as teacher:
        yield Creation(forks, tmp_path, overrides(world, "clair", teacher.base_url), [teacher])


def test_a_disk_that_is_full_again_and_again_is_named_and_costs_nothing_twice(
    whole: Creation, creation: Creation
) -> None:
    with small_disk(creation.run.folder) as resize:
        for kilobytes in (16, 96, 160, 256):
            resize(kilobytes)
            assert_told(creation.ended(2), "replies.sqlite: the disk takes no more")
        resize(4096)
        creation.killed("open:.create.json.partial:1")
        # every reply is there, and no room for the files of pairs
        resize(_used(creation.run.folder) // 1024 + 8)
        assert_told(creation.ended(2), "parquet: cannot be written")
        resize(4096)
        creation.ended()
        assert made(creation.run) == made(whole.run)
        assert files(creation.run) == files(whole.run)


def assert_told(printed: str, error: str) -> None:
    """In the last line, which names the way out."""
    last = printed.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert error in last
    assert "make room" in last or "free space" in last
    assert "Traceback" not in printed


def _used(folder: Path) -> int:
    """Bytes of its disk."""
    disk = os.statvfs(folder)
    return (disk.f_blocks - disk.f_bfree) * disk.f_frsize


def _cut(content: bytearray, tail: int) -> None:
    del content[-tail:]


def _zero(content: bytearray, tail: int) -> None:
    content[-tail:] = bytes(tail)


def _scramble(content: bytearray, tail: int) -> None:
    content[-tail:] = random.Random(tail).randbytes(tail)


Damage = Callable[[bytearray, int], None]


def damage(path: Path, how: Damage, tail: int) -> None:
    content = bytearray(path.read_bytes())
    assert len(content) > tail
    how(content, tail)
    path.write_bytes(content)


def from_the_last_commit(log: bytes) -> int:
    """Bytes from the last transaction's end in SQLite's log to the file's: what follows was never committed."""
    page = int.from_bytes(log[8:12], "big")
    starts = range(32, len(log) - 24 - page + 1, 24 + page)
    of_this_log = [start for start in starts if log[start + 8 : start + 16] == log[16:24]]
    commits = [start for start in of_this_log if any(log[start + 4 : start + 8])]
    return len(log) - commits[-1]


@pytest.mark.parametrize("how", [_cut, _zero, _scramble])
def test_a_log_that_is_damaged_at_its_tail_costs_what_it_held_there_alone(
    whole: Creation, creation: Creation, how: Damage
) -> None:
    """SQLite's log of what a killed process wrote last: what stands before the damage is there."""
    creation.killed(30)
    before = set(creation.stored)
    log = creation.run.folder / "replies.sqlite-wal"
    damage(log, how, from_the_last_commit(log.read_bytes()))
    creation.forget()
    assert len(before) // 2 < len(creation.stored) < len(before)
    creation.ended()
    assert made(creation.run) == made(whole.run)


@pytest.mark.parametrize(
    ("how", "tail"),
    [(_cut, 50_000), (_zero, 40_000), (_scramble, 2000)],
)
def test_a_store_that_is_damaged_at_its_tail_is_told_and_its_way_out_leads_to_the_same_pairs(
    whole: Creation, creation: Creation, how: Damage, tail: int
) -> None:
    store = creation.run.replies
    creation.killed("os.rename:create.json:1")
    with closing(sqlite3.connect(store)) as connection:
        connection.execute("pragma wal_checkpoint(truncate)")
    damage(store, how, tail)
    creation.stored.clear()
    error = creation.printed(2).strip().splitlines()[-1]
    assert f"{store}: the store of replies is damaged" in error
    assert error.isprintable()
    assert "move it aside" in error
    store.rename(store.with_name("aside.sqlite"))
    creation.ended()
    assert made(creation.run) == made(whole.run)
