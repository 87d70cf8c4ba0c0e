from __future__ import annotations

import asyncio
import hashlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tracemalloc
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from commands import STUCK_SECONDS

from anchored.errors import DataError, ReplyError
from anchored.llm.ask import ask_all
from anchored.llm.chat import Reply, Request, Usage
from anchored.llm.replies import Entry, ReplyStore, request_key
from anchored.records import Message


def a_request(text: str = "Why?", **fields: float) -> Request:
    return Request((Message("user", text),), **fields)  # pyright: ignore[reportArgumentType]


def a_reply(text: str = "Because.") -> Reply:
    raw = {"choices": [{"message": {"content": text}}], "odd": [None, 1.5, "\ud83d \u0000 é"]}
    return Reply(text, "stop", "served", "hm", Usage(7, 3), 1.25, raw)


class CountingChat:
    """Answers with the text it was asked, and counts."""

    name = fingerprint = "counting"

    def __init__(self, answer: Callable[[str], Awaitable[str]] | None = None) -> None:
        self.asked: list[str] = []
        self._answer = answer

    async def reply(self, request: Request) -> Reply:
        text = request.messages[0].content
        self.asked.append(text)
        return a_reply(await self._answer(text) if self._answer else text)

    async def close(self) -> None: ...


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "replies.sqlite"


def test_a_reply_comes_back_whole_from_a_file_opened_anew(path: Path) -> None:
    request = a_request()
    with ReplyStore(path) as store:
        assert store.get(request_key("gpt", request)) is None
        store.put([Entry("gpt", request, a_reply())])
    with ReplyStore(path) as store:
        assert store.get(request_key("gpt", request)) == a_reply()
        assert store.get(request_key("other model", request)) is None
        assert store.count() == 1


def test_other_tools_can_read_what_was_asked_and_answered(path: Path) -> None:
    with ReplyStore(path) as store:
        store.put([Entry("gpt", a_request("Wörüm?"), a_reply())])
    question = (
        "select json_extract(request, '$.messages[0].content'), json_extract(reply, '$.text'), model from replies"
    )
    with sqlite3.connect(path) as connection:
        assert connection.execute(question).fetchall() == [("Wörüm?", "Because.", "gpt")]
        created, raw = connection.execute("select created, raw from replies").fetchone()
    assert created.startswith("20")
    assert created.endswith("+00:00")
    assert "choices" in raw


def test_every_part_of_a_request_makes_another_key() -> None:
    base = {"temperature": 0.7, "top_p": 1.0, "max_tokens": 10, "index": 0, "seed": 0}
    others = [
        base | change
        for change in ({"temperature": 0.8}, {"top_p": 0.9}, {"max_tokens": 11}, {"index": 1}, {"seed": 1})
    ]
    keys = {request_key("gpt", a_request(**fields)) for fields in (base, *others)}
    keys |= {request_key("gpt-2", a_request(**base)), request_key("gpt", a_request("Why not?", **base))}
    keys.add(request_key("gpt", Request((Message("system", "Why?"),), 0.7, 1.0, 10)))
    assert len(keys) == 9


def test_a_key_is_the_same_in_every_version() -> None:
    """A changed key loses every reply that was paid for; this one was written down with the first version."""
    request = Request((Message("system", "Be brief."), Message("user", "Wörüm?")), 0, 1, 512, 2, 7)
    written_down = '["gpt-4",[["system","Be brief."],["user","Wörüm?"]],0.0,1.0,512,2,7]'
    assert request_key("gpt-4", request) == hashlib.sha256(written_down.encode()).hexdigest()


def test_a_remembered_chat_asks_once_and_keeps_raw_on_the_disk(path: Path) -> None:
    chat = CountingChat()
    requests = [a_request(str(number % 10)) for number in range(30)]

    async def main() -> None:
        with ReplyStore(path) as store:
            remembered = store.remember(chat)
            for _ in range(2):
                replies = await ask_all(remembered, requests)
                assert [reply.text for reply in replies if isinstance(reply, Reply)] == [str(n % 10) for n in range(30)]
                assert all(isinstance(reply, Reply) and reply.raw == {} for reply in replies)
            assert (remembered.asked, remembered.hits, store.count()) == (10, 50, 10)
            kept = store.get(request_key("counting", requests[3]))
            assert kept == a_reply("3")

    asyncio.run(main())
    assert sorted(chat.asked) == [str(number) for number in range(10)]


def test_a_reply_is_on_the_disk_before_anyone_gets_it(path: Path) -> None:
    async def main() -> None:
        with ReplyStore(path) as store, sqlite3.connect(path) as other:
            for number in range(3):
                await store.remember(CountingChat()).reply(a_request(str(number)))
                assert other.execute("select count(*) from replies").fetchone() == (number + 1,)

    asyncio.run(main())


def test_a_failure_is_not_kept(path: Path) -> None:
    async def unlucky_once(text: str) -> str:
        if len(chat.asked) == 1:
            raise ReplyError("unlucky")
        return text

    chat = CountingChat(unlucky_once)

    async def main() -> None:
        with ReplyStore(path) as store:
            remembered = store.remember(chat)
            with pytest.raises(ReplyError):
                await remembered.reply(a_request())
            assert (await remembered.reply(a_request())).text == "Why?"

    asyncio.run(main())


def test_a_shared_call_goes_on_while_anyone_waits_and_ends_with_the_last(path: Path) -> None:
    proceed = asyncio.Event()
    cancelled: list[str] = []

    async def answer(text: str) -> str:
        try:
            await proceed.wait()
        except asyncio.CancelledError:
            cancelled.append(text)
            raise
        return text

    chat = CountingChat(answer)

    async def main() -> None:
        with ReplyStore(path) as store:
            remembered = store.remember(chat)
            first, second = (asyncio.create_task(remembered.reply(a_request("shared"))) for _ in range(2))
            alone = asyncio.create_task(remembered.reply(a_request("alone")))
            while len(chat.asked) < 2:
                await asyncio.sleep(0.001)
            first.cancel()
            alone.cancel()
            while not cancelled:
                await asyncio.sleep(0.001)
            proceed.set()
            assert (await second).text == "shared"
            assert cancelled == ["alone"]
            assert (store.count(), remembered.asked) == (1, 2)

    asyncio.run(main())


WRITER = """
import asyncio, sys
from anchored.llm.ask import ask_all
from anchored.llm.chat import Reply, Request
from anchored.llm.replies import ReplyStore
from anchored.records import Message

class Chat:
    name = fingerprint = "chat"
    async def reply(self, request):
        await asyncio.sleep(0.001)
        return Reply(request.messages[0].content * 500, "stop", "chat")
    async def close(self): ...

def say(index, reply):
    print(index, flush=True)

first, last = int(sys.argv[2]), int(sys.argv[3])
requests = [Request((Message("user", f"{n} "),)) for n in range(first, last)]
with ReplyStore(sys.argv[1]) as store:
    asyncio.run(ask_all(store.remember(Chat()), requests, on_reply=say))
"""


def start_writer(path: Path, first: int, last: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), str(first), str(last)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("replies_before_the_kill", [1, 700, 3000])
def test_a_kill_loses_nothing_that_anyone_was_given(path: Path, replies_before_the_kill: int) -> None:
    given: list[int] = []
    with start_writer(path, 0, 100_000) as process:
        assert process.stdout
        for line in process.stdout:
            given.append(int(line))
            if len(given) == replies_before_the_kill:
                process.send_signal(signal.SIGKILL)
                break
        given += [int(line) for line in process.stdout.read().split("\n")[:-1]]
    with ReplyStore(path) as store:
        for number in given:
            kept = store.get(request_key("chat", a_request(f"{number} ")))
            assert kept is not None
            assert kept.text == f"{number} " * 500
        assert len(given) <= store.count() < 100_000
        assert store._reader.execute("pragma integrity_check").fetchone() == ("ok",)


def test_several_processes_make_and_fill_one_store(path: Path) -> None:
    writers = [start_writer(path, 100 * number, 100 * number + 300) for number in range(4)]
    for writer in writers:
        _, errors = writer.communicate(timeout=STUCK_SECONDS)
        assert writer.returncode == 0, errors
    with ReplyStore(path) as store:
        assert store.count() == 600


def assert_refused(path: Path, says: str) -> None:
    with pytest.raises(DataError, match=says) as raised:
        read_all(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def read_all(path: Path) -> None:
    with ReplyStore(path) as store:
        for number in range(200):
            store.get(request_key("gpt", a_request(str(number))))


def fill(path: Path) -> None:
    with ReplyStore(path) as store:
        store.put([Entry("gpt", a_request(str(number)), a_reply("x" * 2000)) for number in range(200)])


def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database, " * 500)
    assert_refused(path, r"damaged .*move it aside")
    assert path.read_bytes() == b"not a database, " * 500


def test_many_replies_of_megabytes_are_written_one_at_a_time(path: Path) -> None:
    text = "x" * 4_000_000
    with ReplyStore(path) as store:
        entries = [Entry("m", Request((Message("user", str(n)),)), Reply(text, "stop", "m")) for n in range(12)]
        tracemalloc.start()
        try:
            store.put(entries)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 5 * len(text)


def test_a_damaged_store_is_refused(path: Path) -> None:
    fill(path)
    content = bytearray(path.read_bytes())
    content[5000:-5000] = random.Random(0).randbytes(len(content) - 10_000)
    path.write_bytes(content)
    assert_refused(path, r"damaged .*move it aside.*merge-replies saved\.sqlite")


def test_the_way_out_of_a_damaged_store_can_be_typed_as_it_stands(path: Path) -> None:
    spaced = path.parent / "my runs" / path.name
    fill(spaced)
    os.truncate(spaced, 100_000)
    assert_refused(spaced, rf"`anchored merge-replies saved\.sqlite '{spaced}'`")


def test_a_store_that_was_cut_short_is_refused(path: Path) -> None:
    fill(path)
    os.truncate(path, 100_000)
    assert_refused(path, r"damaged")


def test_an_empty_file_is_a_new_store(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    fill(path)
    with ReplyStore(path) as store:
        assert store.count() == 200


def test_another_kind_of_database_is_refused(path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as connection:
        connection.execute("create table songs (name)")
    assert_refused(path, "none of replies")


def test_a_store_of_a_later_version_is_refused(path: Path) -> None:
    fill(path)
    with sqlite3.connect(path) as connection:
        connection.execute("pragma user_version = 9")
    assert_refused(path, r"later version of anchored \(format 9, .* upgrade")


def test_a_folder_in_its_place_is_refused(path: Path) -> None:
    path.mkdir(parents=True)
    assert_refused(path, "unable to open database file")


def test_a_file_in_its_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    assert_refused(tmp_path / "run" / "replies.sqlite", "Not a directory|File exists")


FILLER = """
import asyncio, resource, sys
from anchored.errors import DataError
from anchored.llm.ask import ask_all
from anchored.llm.chat import Reply, Request
from anchored.llm.replies import ReplyStore
from anchored.records import Message

class Chat:
    name = fingerprint = "chat"
    async def reply(self, request):
        return Reply("x" * 10_000, "stop", "chat")
    async def close(self): ...

given = []
with ReplyStore(sys.argv[1]) as store:
    if sys.argv[2] != "0":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
    try:
        requests = (Request((Message("user", f"{n} "),)) for n in range(1000))
        asyncio.run(ask_all(store.remember(Chat()), requests, on_reply=lambda index, reply: given.append(index)))
    except DataError as error:
        print(error)
        print(len(given), store.count())
"""


def fill_up(path: Path, most_bytes: int) -> None:
    """Fill the store to the brim in a process of its own; what was given out must be there afterwards."""
    command = [sys.executable, "-c", FILLER, str(path), str(most_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=STUCK_SECONDS, check=False)
    message, counts = done.stdout.splitlines()
    assert message.startswith(f"{path}: the disk takes no more (")
    assert "make room, then the same command goes on" in message
    given, stored = map(int, counts.split())
    assert given <= stored < 1000


def test_a_full_disk_is_named_and_loses_nothing(path: Path) -> None:
    """The system's limit on the size of a file stands in for the disk's end: writes really fail in mid-file."""
    fill_up(path, 400_000)
    with ReplyStore(path) as store:  # with room again, it goes on
        before = store.count()
        store.put([Entry("gpt", a_request(), a_reply())])
        assert store.count() == before + 1


def test_a_full_file_system_is_named_and_loses_nothing(tmp_path: Path) -> None:
    if not shutil.which("mount"):
        pytest.skip("needs mount")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        (tmp_path / "ballast").write_bytes(b"x" * 300_000)
        path = tmp_path / "replies.sqlite"
        fill_up(path, 0)
        (tmp_path / "ballast").unlink()
        with ReplyStore(path) as store:
            before = store.count()
            store.put([Entry("gpt", a_request(), a_reply())])
            assert store.count() == before + 1
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_store_that_takes_no_more_lets_nothing_more_be_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []

    class FourAtOnce:
        name = fingerprint = "four"

        def __init__(self) -> None:
            self._places = asyncio.Semaphore(4)

        async def reply(self, request: Request) -> Reply:
            async with self._places:
                sent.append(request.messages[0].content)
                # those after the first four are under way when it comes out that nothing can be kept
                while len(sent) > 4 and not store.failure:
                    await asyncio.sleep(0.001)
                return Reply("fine", "stop", self.name)

        async def close(self) -> None: ...

    def full(*_: object) -> None:
        raise DataError("the disk takes no more")

    with ReplyStore(tmp_path / "replies.sqlite") as store:
        monkeypatch.setattr(store, "put", full)
        with pytest.raises(DataError, match="takes no more"):
            asyncio.run(ask_all(store.remember(FourAtOnce()), map(a_request, map(str, range(200)))))
        assert len(sent) <= 8, "four whose replies are lost, and four under way"


def test_who_asks_in_the_moment_in_which_the_disk_is_full_is_told_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> list[Any]:
        remembered = store.remember(CountingChat())

        async def keep(*_: object) -> None:
            late.append(asyncio.create_task(remembered.reply(a_request("late"))))
            await asyncio.sleep(0)  # it has asked, and its call has not begun
            raise DataError("the disk takes no more")

        late: list[asyncio.Task[Reply]] = []
        monkeypatch.setattr(store, "keep", keep)
        first = await asyncio.gather(remembered.reply(a_request("first")), return_exceptions=True)
        return [*first, *await asyncio.gather(*late, return_exceptions=True)]

    with ReplyStore(tmp_path / "replies.sqlite") as store:
        results = asyncio.run(main())
    assert [(type(result), str(result)) for result in results] == [(DataError, "the disk takes no more")] * 2
