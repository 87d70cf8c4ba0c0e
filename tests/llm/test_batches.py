"""Replies by batches: from a real server with the Batch API on loopback, through files on a real disk."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import signal
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiohttp import web
from batch_server import BatchServer, Fate
from fault_server import Act, completion, cuts, fails, hangs_up, sends

from anchored.errors import BudgetReached, DataError, ModelError, ReplyError, Stopped
from anchored.llm.ask import ask_all, work_in_order
from anchored.llm.batch_api import BatchApi
from anchored.llm.batch_endpoint import cancel_batches
from anchored.llm.batch_files import Batch, BatchFolder, keys_of, outcome
from anchored.llm.batches import BatchChat, Means, Way
from anchored.llm.chat import Reply, Request
from anchored.llm.connection import Connection
from anchored.llm.endpoints import open_endpoints
from anchored.llm.faults import Fault
from anchored.llm.money import Purse, Spending, worst_case
from anchored.llm.openai_chat import OpenAIChat
from anchored.llm.replies import Remembered, ReplyStore
from anchored.llm.settings import BatchSettings, EndpointSettings, Price
from anchored.progress import Silent
from anchored.records import Message

SECRET = "sk-a-key-that-must-not-be-seen"
WORDS = ("ape", "bee", "cat", "dog", "eel", "fox")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[BatchServer]:
    monkeypatch.setattr("anchored.llm.batch_endpoint.SETTLE_SECONDS", 0.01)
    monkeypatch.setattr("anchored.llm.connection.LONGEST_BACKOFF", 0.01)
    monkeypatch.setenv("ANCHORED_TEST_KEY", SECRET)
    with BatchServer() as server:
        yield server


class Heard(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.done: dict[str, int] = {}

    def advance(self, task: str, by: int = 1, **facts: object) -> None:
        self.done[task] = self.done.get(task, 0) + by

    def note(self, text: str) -> None:
        self.notes.append(text)


def a_request(text: str, **more: Any) -> Request:
    return Request((Message("user", text),), **more)


def settings_of(server: BatchServer, **more: Any) -> EndpointSettings:
    defaults = {"model": "m", "base_url": server.base_url, "key_env": "ANCHORED_TEST_KEY", "patience_seconds": 5}
    return EndpointSettings.model_validate({**defaults, **more})


@asynccontextmanager
async def process(
    server: BatchServer,
    folder: Path,
    *,
    way: Way = "submit",
    how: dict[str, Any] | None = None,
    purse: Purse | None = None,
    heard: Heard | None = None,
    imports: Sequence[Path] = (),
    **settings: Any,
) -> AsyncIterator[tuple[BatchChat, Remembered]]:
    """The chat of one process that has taken up what earlier ones left, and the same behind the store."""
    chosen = settings_of(server, **settings)
    with ReplyStore(folder / "replies.sqlite") as store:
        means = Means(
            folder=BatchFolder(folder),
            store=store,
            api=lambda: BatchApi(Connection(chosen)),
            live=lambda: open_endpoints(chosen, purse=purse),
            progress=heard or Heard(),
            purse=purse,
            imports=imports,
        )
        quick = BatchSettings.model_validate({"linger_seconds": 0.05, "poll_seconds": 0.01, **(how or {})})
        chat = BatchChat(chosen, quick, way, means)
        remembered = store.remember(chat, purse)
        try:
            await chat.begin()
            yield chat, remembered
        finally:
            await remembered.close()


def ask(
    server: BatchServer,
    folder: Path,
    words: Sequence[str] = WORDS,
    *,
    complete: bool = True,
    request: Mapping[str, Any] | None = None,
    **more: Any,
) -> list[Reply | ReplyError]:
    """The results of one process that asks all these words at once."""

    async def work() -> list[Reply | ReplyError]:
        async with process(server, folder, **more) as (chat, remembered):
            results = await ask_all(remembered, (a_request(word, **(request or {})) for word in words))
            if complete:
                await chat.complete()
                BatchFolder(folder).note_used()
            return results

    return asyncio.run(work())


def leave_under_way(server: BatchServer, folder: Path, words: Sequence[str] = WORDS, **more: Any) -> None:
    """A process that submits a batch and ends before it has seen anything of it."""
    server.hiccups["look"] = [fails(401)]
    with pytest.raises(ModelError):
        ask(server, folder, words, **more)


def texts(results: Sequence[Reply | ReplyError]) -> list[str]:
    return [result.text if isinstance(result, Reply) else type(result).__name__ for result in results]


LIMIT = {"code": "token_limit_exceeded", "message": "Enqueued token limit reached for m in organization o."}
UPPER = [word.upper() for word in WORDS]


def test_requests_go_out_together_and_come_back_in_their_places(server: BatchServer, tmp_path: Path) -> None:
    heard = Heard()
    assert texts(ask(server, tmp_path, heard=heard)) == UPPER
    assert [len(batch.rows) for batch in server.batches] == [6]
    assert not server.live
    assert heard.done == {"batch-0001": 6}
    assert heard.notes[0] == f"batch-0001: 6 requests go to m at {server.base_url}"
    assert "batch-0001: 6 requests are under way as batch_" in heard.notes[1]
    state = json.loads((tmp_path / "batch-0001.json").read_text())
    assert (state["status"], state["collected"], state["used"], state["requests"]) == ("completed", True, True, 6)
    assert server.batches[0].metadata == {"anchored": state["tag"]}
    assert server.keys_seen == {f"Bearer {SECRET}"}
    for path in tmp_path.iterdir():
        assert SECRET.encode() not in path.read_bytes()


def test_a_batch_and_a_live_chat_send_the_same_and_share_the_store(server: BatchServer, tmp_path: Path) -> None:
    more = {"extra_body": {"reasoning_effort": "low"}, "top_p": 0.9}
    ask(server, tmp_path, ["why?"], **more)
    chosen = settings_of(server, **more)

    async def live() -> OpenAIChat:
        chat = OpenAIChat(chosen)
        await chat.reply(a_request("why?"))
        await chat.close()
        return chat

    chat = asyncio.run(live())
    assert server.live == [server.batches[0].rows[0]["body"]]
    with ReplyStore(tmp_path / "replies.sqlite") as store:
        batched = asyncio.run(made(store, chosen))
    assert (batched.name, batched.fingerprint) == (chat.name, chat.fingerprint)


async def made(store: ReplyStore, settings: EndpointSettings) -> BatchChat:
    """A chat that would wait long for more before it sends anything."""
    means = Means(
        BatchFolder(store.path.parent / "batches"),
        store,
        lambda: BatchApi(Connection(settings)),
        lambda: open_endpoints(settings),
        Heard(),
    )
    return BatchChat(settings, BatchSettings(linger_seconds=3600), "submit", means)


@pytest.mark.parametrize("how", [{"requests": 2}, {"megabytes": 0.0006}])
def test_a_full_batch_goes_and_the_rest_follows(server: BatchServer, tmp_path: Path, how: dict[str, Any]) -> None:
    assert texts(ask(server, tmp_path, how=how)) == UPPER
    assert len(server.batches) == 3
    assert all(len(server.files[batch.file_id]) <= 600 for batch in server.batches)
    assert set(server.submitted.values()) == {1}


def test_what_is_in_the_error_file_is_an_outcome_or_asked_again(server: BatchServer, tmp_path: Path) -> None:
    refused = {1: (400, "too long"), 2: (429, "slow down"), 3: (500, "oh")}
    server.fates = [Fate(refused=refused, missing=frozenset({4}), doubled=frozenset({5}))]
    results = ask(server, tmp_path)
    assert texts(results) == ["APE", "ReplyError", *UPPER[2:]]
    assert "too long" in str(results[1])
    assert [len(batch.rows) for batch in server.batches] == [6, 3]


def test_what_came_before_a_batch_expired_is_kept(server: BatchServer, tmp_path: Path) -> None:
    server.fates = [Fate("expired", answered=4)]
    assert texts(ask(server, tmp_path)) == UPPER
    assert [len(batch.rows) for batch in server.batches] == [6, 2]


def test_a_batch_that_others_cancelled_is_not_made_again_unasked(server: BatchServer, tmp_path: Path) -> None:
    server.fates = [Fate("cancelled", answered=4)]
    with pytest.raises(Stopped, match=r"batch-0001 \(batch_2\) was cancelled at m at .*; what it answered is kept"):
        ask(server, tmp_path)
    assert len(server.batches) == 1
    assert texts(ask(server, tmp_path)) == UPPER
    assert [len(batch.rows) for batch in server.batches] == [6, 2]


def test_a_row_is_asked_again_only_so_often(server: BatchServer, tmp_path: Path) -> None:
    server.fates = [Fate("expired", answered=0), Fate("expired", answered=0)]
    results = ask(server, tmp_path, ["ape"], how={"retries": 1})
    assert texts(results) == ["NoReply"]
    assert "2 batches (last: the batch was expired)" in str(results[0])


def test_a_batch_that_fails_says_why_in_the_endpoints_words(server: BatchServer, tmp_path: Path) -> None:
    error = {"code": "model_not_found", "message": "The model m does not exist", "line": 1, "param": "body.model"}
    server.fates = [Fate("failed", [error])]
    with pytest.raises(ModelError, match=r"The model m does not exist \(line 1\).*batch-0001.jsonl"):
        ask(server, tmp_path)
    assert texts(ask(server, tmp_path)) == UPPER


def test_too_much_under_way_goes_out_in_smaller_batches(server: BatchServer, tmp_path: Path) -> None:
    server.fates = [Fate("failed", [LIMIT]), Fate("failed", [LIMIT])]
    assert texts(ask(server, tmp_path)) == UPPER
    assert [len(batch.rows) for batch in server.batches][:3] == [6, 3, 3]
    assert sum(len(batch.rows) for batch in server.batches if batch.fate.status == "completed") == 6


def test_what_was_too_much_waits_until_a_batch_has_ended(server: BatchServer, tmp_path: Path) -> None:
    server.fates = [Fate(looks=30), Fate("failed", [LIMIT]), Fate("failed", [LIMIT])]
    assert texts(ask(server, tmp_path, how={"requests": 2})) == UPPER
    assert [len(batch.rows) for batch in server.batches] == [2, 2, 2, 2, 2]


@pytest.mark.parametrize("way", ["submit", "live"])
def test_rows_of_an_earlier_batch_that_was_too_much_are_asked_however_late(
    server: BatchServer, tmp_path: Path, way: Way
) -> None:
    server.fates = [Fate("failed", [LIMIT], looks=3)]
    leave_under_way(server, tmp_path)

    async def late() -> list[Reply | ReplyError]:
        async with process(server, tmp_path, way=way) as (_, remembered), asyncio.timeout(60):
            while not (tmp_path / "batch-0001.json").read_text().count('"failed"'):
                await asyncio.sleep(0.01)
            return await ask_all(remembered, map(a_request, WORDS))

    assert texts(asyncio.run(late())) == UPPER
    assert len(server.live) == (6 if way == "live" else 0)


def test_one_row_that_is_too_much_stops_it(server: BatchServer, tmp_path: Path) -> None:
    server.fates = [Fate("failed", [LIMIT])]
    with pytest.raises(Stopped, match="Enqueued token limit reached"):
        ask(server, tmp_path, ["ape"])


@pytest.mark.parametrize("route", ["upload", "make", "look", "content"])
@pytest.mark.parametrize(
    "acts", [[fails(429), hangs_up()], [fails(500), cuts()]], ids=["429, a closed connection", "500, a cut reply"]
)
def test_a_hiccup_of_the_endpoint_sends_nothing_twice(
    server: BatchServer, tmp_path: Path, route: str, acts: list[Act]
) -> None:
    server.hiccups[route] = acts.copy()
    assert texts(ask(server, tmp_path)) == UPPER
    assert set(server.submitted.values()) == {1}


@pytest.mark.parametrize("keeps_metadata", [True, False])
def test_a_batch_whose_making_was_not_confirmed_is_found(
    server: BatchServer, tmp_path: Path, keeps_metadata: bool
) -> None:
    server.keeps_metadata = keeps_metadata
    server.lost["make"] = [hangs_up()]
    server.hiccups["list"] = [fails(503)]
    assert texts(ask(server, tmp_path)) == UPPER
    assert len(server.batches) == 1


def test_a_batch_is_found_behind_newer_ones(server: BatchServer, tmp_path: Path) -> None:
    server.lost["make"] = [fails(401)]  # says no although it did it: the process ends
    with pytest.raises(ModelError):
        ask(server, tmp_path)
    for other in range(5):
        ask(server, tmp_path / f"other{other}", [f"other {other}"])
    assert texts(ask(server, tmp_path)) == UPPER
    assert set(server.submitted.values()) == {1}


def test_a_batch_that_was_never_made_is_dropped(server: BatchServer, tmp_path: Path) -> None:
    server.hiccups["make"] = [fails(400)]
    with pytest.raises(ModelError, match="takes no such batch"):
        ask(server, tmp_path)
    assert (tmp_path / "batch-0001.json").exists()
    assert texts(ask(server, tmp_path, ["gnu"])) == ["GNU"]
    assert list(server.submitted.values()) == [1]


def test_an_endpoint_without_batches_is_named(server: BatchServer, tmp_path: Path) -> None:
    server.hiccups["upload"] = [fails(404)]
    with pytest.raises(ModelError, match=r"no Batch API.*--batch-export"):
        ask(server, tmp_path)


def test_a_refused_key_and_spent_money_end_it(server: BatchServer, tmp_path: Path) -> None:
    server.hiccups["upload"] = [fails(401, {"message": f"bad key {SECRET}"})]
    with pytest.raises(ModelError, match="ANCHORED_TEST_KEY") as caught:
        ask(server, tmp_path / "a")
    assert SECRET not in str(caught.value)
    server.hiccups["make"] = [fails(429, {"code": "insufficient_quota", "message": "You exceeded your quota"})]
    with pytest.raises(Stopped, match="top up"):
        ask(server, tmp_path / "b")
    server.fates = [Fate(refused={0: (402, "insufficient_balance")})]
    with pytest.raises(Stopped, match="top up"):
        ask(server, tmp_path / "c")
    # what was answered beside it is not asked again
    before = len(server.batches)
    assert texts(ask(server, tmp_path / "c")) == UPPER
    assert [len(batch.rows) for batch in server.batches[before:]] == [1]


def test_a_parameter_that_the_model_refuses_is_left_out_in_the_next_batch(server: BatchServer, tmp_path: Path) -> None:
    no = (400, "Unsupported parameter: 'max_tokens' is not supported with this model")
    server.fates = [Fate(refused=dict.fromkeys(range(6), no))]
    assert texts(ask(server, tmp_path)) == UPPER
    assert "max_completion_tokens" in server.batches[1].rows[0]["body"]


def test_an_unknown_batch_names_the_way_out(server: BatchServer, tmp_path: Path) -> None:
    leave_under_way(server, tmp_path)
    made = server.batches.copy()
    server.batches.clear()
    with pytest.raises(ModelError, match=r"knows no batch batch_.*batch-0001\.json to ask its requests again"):
        ask(server, tmp_path)
    server.batches.extend(made)
    assert texts(ask(server, tmp_path)) == UPPER
    assert set(server.submitted.values()) == {1}


def test_requests_that_are_gone_name_the_way_out(server: BatchServer, tmp_path: Path) -> None:
    leave_under_way(server, tmp_path)
    lines = (tmp_path / "batch-0001.jsonl").read_bytes()
    (tmp_path / "batch-0001.jsonl").write_bytes(lines[:-100])
    with pytest.raises(DataError, match=r"batch-0001\.jsonl: the requests of a batch cannot be read"):
        ask(server, tmp_path)
    (tmp_path / "batch-0001.jsonl").unlink()
    with pytest.raises(DataError, match=r"batch-0001\.jsonl: the requests .* are gone; .* delete batch-0001\.json "):
        ask(server, tmp_path)
    (tmp_path / "batch-0001.json").unlink()
    assert texts(ask(server, tmp_path)) == UPPER


def test_a_key_that_is_echoed_is_not_kept(server: BatchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anchored.llm.batch_api.CHUNK_BYTES", 7)
    server.answer = lambda body: completion(f"the key is {SECRET}")
    assert texts(ask(server, tmp_path, ["ape"])) == ["the key is [key]"]
    assert SECRET not in (tmp_path / "batch-0001.output.jsonl").read_text()


def test_a_live_process_waits_for_a_batch_and_asks_only_the_rest(server: BatchServer, tmp_path: Path) -> None:
    server.fates = [Fate("expired", answered=4)]
    leave_under_way(server, tmp_path)
    assert texts(ask(server, tmp_path, [*WORDS, "gnu"], way="live")) == [*UPPER, "GNU"]
    assert sorted(body["messages"][0]["content"] for body in server.live) == ["eel", "fox", "gnu"]


def test_replies_on_the_disk_are_found_again_and_refusals_until_the_stage_is_complete(
    server: BatchServer, tmp_path: Path
) -> None:
    server.fates = [Fate(refused={0: (400, "too long")})]
    assert texts(ask(server, tmp_path, complete=False))[0] == "ReplyError"
    assert texts(ask(server, tmp_path, complete=True))[0] == "ReplyError"
    assert len(server.batches) == 1
    assert texts(ask(server, tmp_path)) == UPPER
    assert [len(batch.rows) for batch in server.batches] == [6, 1]


def test_cancelled_batches_are_collected(server: BatchServer, tmp_path: Path) -> None:
    server.fates = [Fate(answered=2, looks=10**6)]
    leave_under_way(server, tmp_path)
    heard = Heard()

    def cancel(asked: dict[str, EndpointSettings]) -> None:
        asyncio.run(cancel_batches(BatchFolder(tmp_path), asked, heard))

    with pytest.raises(
        ModelError, match=r"batch-0001 \(batch_2, 6 requests\) is not cancelled: the recipe asks no m now"
    ):
        cancel({})
    with pytest.raises(ModelError, match=r"not cancelled: .*batch-0001\.json: this batch was sent to"):
        cancel({"m": settings_of(server, base_url="http://127.0.0.1:9/v1")})
    server.hiccups["cancel"] = [fails(401)]
    with pytest.raises(ModelError, match=r"not cancelled: .* refused the key in ANCHORED_TEST_KEY \(401"):
        cancel({"m": settings_of(server)})
    cancel({"m": settings_of(server)})
    assert heard.notes == ["batch-0001 (batch_2, 6 requests): cancelling"]
    assert texts(ask(server, tmp_path, way="live")) == UPPER
    assert len(server.live) == 4


def test_one_missing_key_leaves_the_other_batches_to_be_cancelled(server: BatchServer, tmp_path: Path) -> None:
    server.fates = [Fate(looks=10**6), Fate(looks=10**6)]
    leave_under_way(server, tmp_path, ["ape"], model="ada")
    leave_under_way(server, tmp_path, ["bee"], model="bob")
    asked = {"ada": settings_of(server, model="ada", key_env="NO_SUCH_KEY", base_url="https://example.org/v1")}
    with pytest.raises(
        ModelError, match=r"batch-0001 .*needs a key and the environment variable NO_SUCH_KEY holds none"
    ):
        asyncio.run(cancel_batches(BatchFolder(tmp_path), {**asked, "bob": settings_of(server, model="bob")}, Heard()))
    assert [made.cancelled for made in server.batches] == [False, True]


@pytest.mark.parametrize("cancels", [True, False])
def test_a_list_that_lags_loses_no_batch(server: BatchServer, tmp_path: Path, cancels: bool) -> None:
    server.lost["make"] = [fails(401)]  # says no although it did it
    with pytest.raises(ModelError):
        ask(server, tmp_path)
    server.hiccups["list"] = [sends('{"data": [], "has_more": false}')]
    if cancels:
        asyncio.run(cancel_batches(BatchFolder(tmp_path), {"m": settings_of(server)}, Heard()))
        assert server.batches[0].cancelled
    assert texts(ask(server, tmp_path)) == UPPER
    assert set(server.submitted.values()) == {1}


def test_the_empty_list_of_another_account_loses_no_batch(server: BatchServer, tmp_path: Path) -> None:
    server.lost["make"] = [fails(401)]
    with pytest.raises(ModelError):
        ask(server, tmp_path)
    why = r"knows no file file-1, .* give back the key that it was uploaded with, or del"
    server.hiccups["list"] = [sends('{"data": [], "has_more": false}')] * 4
    server.hiccups["file"] = [fails(404)] * 2
    with pytest.raises(ModelError, match=why):
        asyncio.run(cancel_batches(BatchFolder(tmp_path), {"m": settings_of(server)}, Heard()))
    with pytest.raises(ModelError, match=why):
        ask(server, tmp_path)
    assert texts(ask(server, tmp_path)) == UPPER
    assert set(server.submitted.values()) == {1}


# what the endpoint says is not what it gives


@pytest.mark.parametrize("fate", [Fate(late=3), Fate("expired", answered=4, late=2)])
def test_replies_whose_file_is_named_late_are_waited_for(server: BatchServer, tmp_path: Path, fate: Fate) -> None:
    server.fates = [fate]
    assert texts(ask(server, tmp_path)) == UPPER
    assert max(server.submitted.values()) == (1 if fate.answered is None else 2)
    assert [len(batch.rows) for batch in server.batches][1:] == ([] if fate.answered is None else [2])


def test_a_batch_with_fewer_replies_than_it_counts_is_not_taken_for_collected(
    server: BatchServer, tmp_path: Path
) -> None:
    server.fates = [Fate(short=2)]
    for way in ("submit", "live"):
        with pytest.raises(
            Stopped, match=r"gives 4 of 6 replies of batch-0001; .* delete .*batch-0001\.json to ask its requests again"
        ):
            ask(server, tmp_path, way=way, patience_seconds=0.1)
    server.batches[0].fate.short = 0
    assert texts(ask(server, tmp_path)) == UPPER
    assert (len(server.batches), server.live) == (1, [])


def test_what_came_of_a_batch_with_fewer_replies_can_be_kept_by_hand(server: BatchServer, tmp_path: Path) -> None:
    server.fates = [Fate(short=2)]
    with pytest.raises(Stopped):
        ask(server, tmp_path, patience_seconds=0.1)
    (tmp_path / "batch-0001.json").unlink()
    assert texts(ask(server, tmp_path, imports=[tmp_path / "batch-0001.output.jsonl"])) == UPPER
    assert [len(made.rows) for made in server.batches] == [6, 2]


def test_what_a_batch_answered_before_it_failed_is_kept(server: BatchServer, tmp_path: Path) -> None:
    server.fates = [Fate("failed", [{"code": "internal", "message": "worker died"}], answered=4)]
    assert texts(ask(server, tmp_path)) == UPPER
    assert [len(batch.rows) for batch in server.batches] == [6, 2]


def test_a_status_in_capitals_is_understood_and_an_unknown_one_named(server: BatchServer, tmp_path: Path) -> None:
    server.fates = [Fate(says="COMPLETED"), Fate(says="Done")]
    assert texts(ask(server, tmp_path / "a")) == UPPER
    with pytest.raises(
        ModelError, match=r"calls the batch 'done', .* delete .*batch-0001\.json to ask its requests live"
    ):
        ask(server, tmp_path / "b")


def test_results_that_are_gone_name_the_way_out(server: BatchServer, tmp_path: Path) -> None:
    for way in ("submit", "live"):
        server.hiccups["content"] = [fails(404)]
        with pytest.raises(
            ModelError, match=r"does not have the results of batch-0001 .* delete .*batch-0001\.json to ask"
        ):
            ask(server, tmp_path, way=way)
    (tmp_path / "batch-0001.json").unlink()
    assert texts(ask(server, tmp_path)) == UPPER
    assert (tmp_path / "batch-0002.json").exists()  # whatever is left of the first is not its own


def test_an_endpoint_that_lists_no_batches_names_the_way_out(server: BatchServer, tmp_path: Path) -> None:
    server.lost["make"] = [hangs_up()]
    server.hiccups["list"] = [fails(404)]
    with pytest.raises(ModelError, match=r"lists no batches .* made of file-1, then delete .*batch-0001\.json to ask"):
        ask(server, tmp_path)


@pytest.mark.parametrize("route", ["upload", "make", "look", "list"])
def test_what_is_no_answer_of_a_batch_api_is_asked_for_again(server: BatchServer, tmp_path: Path, route: str) -> None:
    if route == "list":
        server.lost["make"] = [hangs_up()]
    objects = (sends(text) for text in ("[]", '{"id": 7, "status": ["completed"], "data": 3}', '{"data": [7]}'))
    server.hiccups[route] = [sends("<html>sign in</html>", "text/html"), *objects]
    assert texts(ask(server, tmp_path)) == UPPER
    assert set(server.submitted.values()) == {1}


def test_what_is_never_a_batch_stops_it(server: BatchServer, tmp_path: Path) -> None:
    server.hiccups["make"] = [sends("<html>sign in</html>", "text/html")] * 1000
    with pytest.raises(Stopped, match=r"is down or not ready \(the reply is no JSON\)"):
        ask(server, tmp_path, patience_seconds=0.1)


def test_a_full_disk_is_no_fault_of_the_endpoint(
    server: BatchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anchored.llm.batch_api.written_aside", lambda _: nullcontext("/dev/full"))
    with pytest.raises(
        DataError, match=r"batch-0001\.output\.jsonl: the disk .* \(No space left on device\); make room"
    ):
        ask(server, tmp_path)
    monkeypatch.undo()
    monkeypatch.setenv("ANCHORED_TEST_KEY", SECRET)
    assert texts(ask(server, tmp_path)) == UPPER
    assert set(server.submitted.values()) == {1}


def test_patience_counts_from_the_first_failure(server: BatchServer, tmp_path: Path) -> None:
    async def long(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.5)
        raise web.HTTPBadGateway

    server.hiccups["content"] = [long]
    assert texts(ask(server, tmp_path, patience_seconds=0.2)) == UPPER


# money

PRICE = {"input": 2.0, "output": 10.0}
USED = (7 * 2 + 3 * 10) / 1e6 / 2


def test_a_row_costs_half_and_is_counted_once(server: BatchServer, tmp_path: Path) -> None:
    purse = Purse(1.0)
    ask(server, tmp_path, purse=purse, price=PRICE)
    assert purse.spent_usd == pytest.approx(6 * USED)
    assert purse.has(1.0 - 6 * USED)
    assert not purse.has(1.0 - 5.9 * USED)


def test_a_cap_makes_batches_smaller_and_is_never_passed(server: BatchServer, tmp_path: Path) -> None:
    worst = (1024 * 10 + 100 * 2) / 1e6 / 2
    cap = 2.5 * worst
    heard = Heard()
    assert texts(ask(server, tmp_path, purse=Purse(cap), price=PRICE, heard=heard)) == UPPER
    assert heard.notes[0].endswith(
        " USD at most; 4 more wait, create.budget_usd has no room for them at their worst case"
    )
    assert [len(batch.rows) for batch in server.batches] == [2, 2, 2]
    with pytest.raises(BudgetReached, match=r"raise create\.budget_usd"):
        ask(server, tmp_path / "less", purse=Purse(0.5 * worst), price=PRICE)
    assert len(server.batches) == 3


def test_a_batch_under_way_holds_its_money_after_a_restart(server: BatchServer, tmp_path: Path) -> None:
    worst = (1024 * 10 + 100 * 2) / 1e6 / 2
    leave_under_way(server, tmp_path, purse=Purse(7 * worst), price=PRICE)
    server.batches[0].fate.looks = 30
    purse = Purse(7 * worst)
    assert texts(ask(server, tmp_path, [*WORDS, "gnu", "hen"], purse=purse, price=PRICE)) == [*UPPER, "GNU", "HEN"]
    assert [len(batch.rows) for batch in server.batches] == [6, 1, 1]
    assert purse.spent_usd == pytest.approx(8 * USED)


def worst(server: BatchServer) -> float:
    """The most that a row of the latest batch can cost."""
    price = BatchSettings().price(Price.model_validate(PRICE))
    assert price
    return worst_case(price, server.batches[-1].rows[0]["body"])


def spendings(folder: Path) -> list[Spending]:
    """What the store has listed."""
    with ReplyStore(folder / "replies.sqlite") as store:
        return store.spent()


def by_basis(folder: Path) -> dict[str, float]:
    return {spending.basis: spending.usd for spending in spendings(folder)}


def test_what_got_no_reply_and_may_have_been_billed_is_spent_once(server: BatchServer, tmp_path: Path) -> None:
    refused = {0: (504, "gave up"), 1: (429, "slow down"), 2: (500, "oh")}
    server.fates = [Fate(refused=refused, missing=frozenset({4}))]
    server.answer = lambda body: completion(
        body["messages"][-1]["content"].upper(), finish_reason="error" if "dog" in str(body) else "stop"
    )
    for _ in range(2):
        purse = Purse(1.0, spendings(tmp_path))
        found = ask(server, tmp_path, purse=purse, price=PRICE, how={"retries": 0}, complete=False)
        assert texts(found) == ["NoReply"] * 5 + ["FOX"]
        expected = {"unsure": pytest.approx(3 * worst(server)), "usage": pytest.approx(USED)}
        assert by_basis(tmp_path) == expected
        assert purse.spent().by_basis == expected
    assert len(server.batches) == 1


def die_before_it_is_noted_as_kept(base_url: str, folder: Path) -> None:
    """A process that is killed when the batch's money is counted, and its file does not say so yet."""
    save = Batch.save

    def save_or_die(batch: Batch) -> None:
        if batch.state.kept:
            os.kill(os.getpid(), signal.SIGKILL)
        save(batch)

    Batch.save = save_or_die
    there = cast(BatchServer, SimpleNamespace(base_url=base_url))
    ask(there, folder, purse=Purse(1.0), price=PRICE, how={"retries": 0}, complete=False)


def test_a_kill_between_counting_and_noting_it_counts_nothing_twice(server: BatchServer, tmp_path: Path) -> None:
    server.fates = [Fate(refused=dict.fromkeys((0, 2), (504, "gave up")))]
    spawned = multiprocessing.get_context("spawn").Process(
        target=die_before_it_is_noted_as_kept, args=(server.base_url, tmp_path)
    )
    spawned.start()
    spawned.join()
    assert spawned.exitcode == -signal.SIGKILL
    expected = {"unsure": pytest.approx(2 * worst(server)), "usage": pytest.approx(4 * USED)}
    assert by_basis(tmp_path) == expected
    for _ in range(2):
        purse = Purse(1.0, spendings(tmp_path))
        found = ask(server, tmp_path, purse=purse, price=PRICE, how={"retries": 0}, complete=False)
        assert Counter(texts(found))["NoReply"] == 2
        assert by_basis(tmp_path) == expected
        assert purse.spent().by_basis == expected
    assert len(server.batches) == 1


def test_what_the_endpoint_says_it_never_ran_costs_nothing(server: BatchServer, tmp_path: Path) -> None:
    server.fates = [Fate("expired", answered=4)]
    assert texts(ask(server, tmp_path, purse=Purse(1.0), price=PRICE)) == UPPER
    assert by_basis(tmp_path) == {"usage": pytest.approx(6 * USED)}


def test_what_is_under_way_is_set_aside_at_todays_price(server: BatchServer, tmp_path: Path) -> None:
    leave_under_way(server, tmp_path)  # when it was sent money was not counted
    server.batches[0].fate.looks = 10**6
    purse = Purse(7 * worst(server))

    async def left() -> None:
        async with process(server, tmp_path, purse=purse, price=PRICE):
            assert purse.has(worst(server))
            assert not purse.has(1.01 * worst(server))

    asyncio.run(left())


def test_money_that_is_enough_but_for_rounding_is_enough(server: BatchServer, tmp_path: Path) -> None:
    ask(server, tmp_path, ["ape"])
    most, drawn = worst(server), random.Random(0)
    before = next(spent for spent in iter(drawn.random, None) if (spent + most) - spent < most)
    purse = Purse(before + most, [Spending("m", before, "usage")])
    assert texts(ask(server, tmp_path / "rounded", ["bee"], purse=purse, price=PRICE)) == ["BEE"]


# export and import


def run_elsewhere(requests: Path, results: Path, *, refuse: str = "") -> None:
    """What `vllm run-batch -i requests -o results` does, in its own form of lines."""
    with open(requests) as lines, open(results, "w") as out:
        for line in map(json.loads, lines):
            said = line["body"]["messages"][-1]["content"]
            row: dict[str, Any] = {"id": "vllm-1", "custom_id": line["custom_id"]}
            if said == refuse:
                error = {"error": {"message": "too long", "type": "BadRequestError", "param": None, "code": 400}}
                row |= {"response": {"status_code": 400, "request_id": "r", "body": None}, "error": error}
            else:
                row |= {"response": {"status_code": 200, "request_id": "r", "body": completion(said.upper())}}
                row["error"] = None
            out.write(json.dumps(row) + "\n")


def test_an_export_run_elsewhere_is_taken_back_without_an_endpoint(server: BatchServer, tmp_path: Path) -> None:
    with pytest.raises(Stopped, match=r"6 requests are in .*export-0001.jsonl; run them.*--batch-import") as caught:
        ask(server, tmp_path, way="export")
    assert caught.value.exit_code == 3
    results = tmp_path / "OUT.jsonl"
    run_elsewhere(tmp_path / "export-0001.jsonl", results, refuse="bee")
    with open(results, "a") as out:
        out.write(json.dumps({"custom_id": "row-1", "response": {"status_code": 200, "body": {}}}) + "\n")
        out.write('{"custom_id": "torn')
    heard = Heard()
    found = ask(server, tmp_path, way="live", imports=[results], heard=heard, base_url="http://127.0.0.1:9/v1")
    assert texts(found) == ["APE", "ReplyError", *UPPER[2:]]
    assert heard.notes == [
        f"{results}: 5 replies, 1 requests without one (the first: 400: too long), 1 results of requests that are not "
        "this run's, 1 line that is no result"
    ]
    assert not server.calls


@pytest.mark.parametrize("content", ["", "no JSON\n", '{"custom_id": "row-1", "response": {"status_code": 200}}\n'])
def test_a_file_without_a_result_of_the_run_is_refused_before_anything_is_asked_live(
    server: BatchServer, tmp_path: Path, content: str
) -> None:
    with pytest.raises(Stopped):
        ask(server, tmp_path, way="export")
    results = tmp_path / "OUT.jsonl"
    results.write_text(content)
    with pytest.raises(DataError, match=r"OUT\.jsonl: holds no result of this run's requests"):
        ask(server, tmp_path, way="live", imports=[results])
    assert not server.calls


def test_an_export_of_many_rows_is_several_files_and_a_second_one_holds_the_rest(
    server: BatchServer, tmp_path: Path
) -> None:
    with pytest.raises(Stopped, match=r"export-0001\.jsonl to export-0003\.jsonl"):
        ask(server, tmp_path, way="export", how={"requests": 2})
    results = tmp_path / "OUT.jsonl"
    run_elsewhere(tmp_path / "export-0002.jsonl", results)
    with pytest.raises(Stopped, match="4 requests"):
        ask(server, tmp_path, way="export", imports=[results])
    assert len(list(keys_of(tmp_path / "export-0001.jsonl"))) == 4
    assert not (tmp_path / "export-0002.jsonl").exists()


def test_what_is_under_way_is_not_exported(server: BatchServer, tmp_path: Path) -> None:
    leave_under_way(server, tmp_path)
    with pytest.raises(DataError, match=r"collect it with --batch"):
        ask(server, tmp_path, way="export")


def test_nothing_goes_out_once_the_stage_has_failed(server: BatchServer, tmp_path: Path) -> None:
    heard = Heard()

    async def fail() -> None:
        async with process(server, tmp_path, heard=heard, how={"linger_seconds": 0.3}) as (chat, remembered):
            sixth_asked = asyncio.Event()

            async def work(index: int, word: str) -> Reply:
                if index == 6:
                    await sixth_asked.wait()
                    raise ModelError("the policy's server died")
                if index == 5:
                    sixth_asked.set()
                return await remembered.reply(a_request(word))

            try:
                await work_in_order([*WORDS, "gnu"], work, lambda _: None, on_failure=chat.halt)
            finally:
                with pytest.raises(Stopped, match="ended by something else"):
                    await remembered.reply(a_request("late"))
                await asyncio.sleep(0.4)

    with pytest.raises(ModelError, match="the policy's server died"):
        asyncio.run(fail())
    assert heard.notes == []
    assert not server.batches


@pytest.mark.parametrize(
    ("line", "follows"),
    [
        ({"response": {"status_code": 400, "body": {"error": {"message": "no"}}}, "error": None}, "row"),
        ({"response": {"status_code": 400, "body": None}, "error": "an error in words"}, "row"),
        ({"response": {"status_code": 400}, "error": {"object": "error", "message": "no", "code": 400}}, "row"),
        ({"response": None, "error": {"code": "batch_expired", "message": "no time"}}, "again"),
        ({"response": {"status_code": 200, "body": None}, "error": None}, "again"),
        ({"response": {"status_code": 200, "body": {"a": 1}}, "error": {"message": "broken"}}, "again"),
        ({}, "again"),
    ],
)
def test_faults_in_result_lines(line: dict[str, Any], follows: str) -> None:
    fault = outcome(line)
    assert isinstance(fault, Fault)
    assert fault.follows == follows


def test_the_chat_is_closed_at_any_moment(server: BatchServer, tmp_path: Path) -> None:
    async def closed_after(steps: int) -> None:
        with ReplyStore(tmp_path / "replies.sqlite") as store:
            chat = await made(store, settings_of(server))
            await chat.begin()
            asked = asyncio.create_task(chat.reply(a_request("ape")))
            for _ in range(steps):
                await asyncio.sleep(0)
            async with asyncio.timeout(60):
                await chat.close()
            asked.cancel()

    for steps in range(8):
        asyncio.run(closed_after(steps))


def spent(folder: Path) -> float:
    """What the store has listed, in USD."""
    return sum(spending.usd for spending in spendings(folder))


def kept(folder: Path) -> int:
    with ReplyStore(folder / "replies.sqlite") as store:
        return store.count()


def test_what_nobody_asks_for_any_more_is_kept_and_counted_once(server: BatchServer, tmp_path: Path) -> None:
    leave_under_way(server, tmp_path, purse=Purse(), price=PRICE)
    assert (kept(tmp_path), spent(tmp_path)) == (0, 0)
    purse = Purse()
    assert texts(ask(server, tmp_path, ["ape", "gnu"], purse=purse, price=PRICE)) == ["APE", "GNU"]
    assert kept(tmp_path) == 7
    assert spent(tmp_path) == pytest.approx(7 * USED) == purse.spent_usd
    assert texts(ask(server, tmp_path, purse=Purse(), price=PRICE)) == UPPER
    assert spent(tmp_path) == pytest.approx(7 * USED)
    assert set(server.submitted.values()) == {1}


def test_a_batch_is_counted_once_by_a_process_that_was_killed_before_it_noted_so(
    server: BatchServer, tmp_path: Path
) -> None:
    ask(server, tmp_path, purse=Purse(), price=PRICE)
    state = tmp_path / "batch-0001.json"
    state.write_text(state.read_text().replace('"kept": true', '"kept": false'))
    with sqlite3.connect(tmp_path / "replies.sqlite") as store:  # the latest part of it was not in the store yet
        store.execute("delete from replies where rowid > 4")
        store.execute("delete from spending where rowid > 4")
    purse = Purse(None, [Spending("m", spent(tmp_path), "usage")])
    assert texts(ask(server, tmp_path, WORDS[:1], purse=purse, price=PRICE)) == ["APE"]
    assert kept(tmp_path) == 6
    assert spent(tmp_path) == pytest.approx(6 * USED) == purse.spent_usd
    assert not server.live
    assert len(server.batches) == 1


def test_a_batch_that_has_ended_answers_also_under_another_limit(server: BatchServer, tmp_path: Path) -> None:
    server.fates = [Fate(looks=0)]
    leave_under_way(server, tmp_path)
    assert texts(ask(server, tmp_path, request={"max_tokens": 2048})) == UPPER
    assert len(server.batches) == 1


def test_a_request_that_failed_in_other_processes_is_not_asked_for_ever(server: BatchServer, tmp_path: Path) -> None:
    more: dict[str, Any] = {"how": {"retries": 2}, "complete": False}
    server.fates = [Fate("expired", answered=0), Fate(missing=frozenset({0})), Fate("expired", answered=0)]
    leave_under_way(server, tmp_path, ["ape"], **more)
    for _ in range(2):
        failed = ask(server, tmp_path, ["ape"], **more)
        assert texts(failed) == ["NoReply"]
        assert "in 3 batches (last: the batch was expired)" in str(failed[0])
        assert len(server.batches) == 3
    assert texts(ask(server, tmp_path, ["ape"], how={"retries": 2})) == ["NoReply"]
    # the stage was complete, so it may be asked again
    assert texts(ask(server, tmp_path, ["ape"], how={"retries": 2})) == ["APE"]


def test_a_batch_whose_making_was_not_confirmed_is_cancelled(server: BatchServer, tmp_path: Path) -> None:
    server.lost["make"] = [fails(401)]  # says no although it did it
    with pytest.raises(ModelError):
        ask(server, tmp_path)
    server.hiccups["make"] = [fails(401)]
    with pytest.raises(ModelError):
        ask(server, tmp_path / "never")
    heard = Heard()
    for folder in (tmp_path, tmp_path / "never"):
        asyncio.run(cancel_batches(BatchFolder(folder), {"m": settings_of(server)}, heard))
    assert server.batches[0].cancelled
    assert heard.notes == [
        "batch-0001 (batch_2, 6 requests): cancelling",
        "batch-0001 (uploaded, 6 requests): no batch was made of it",
    ]
    assert not (tmp_path / "never" / "batch-0001.json").exists()
