"""Stop strings: one text, whoever stops it, an endpoint, a batch, the store or the model in this process."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web
from fault_server import Act, FaultServer, completion, fails, says
from tiny_models import CHATML, END, START, save_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from anchored.errors import ReplyError
from anchored.llm.batch_files import Asked, Batch, State
from anchored.llm.batch_results import BatchResults
from anchored.llm.bodies import request_body
from anchored.llm.chat import Reply, Request, Usage
from anchored.llm.local_chat import LocalChat, noise_key
from anchored.llm.money import Purse
from anchored.llm.openai_chat import OpenAIChat
from anchored.llm.replies import Entry, ReplyStore, request_key
from anchored.llm.settings import EndpointSettings, Price
from anchored.llm.stops import cut_at_stop, first_stop
from anchored.records import Message

WHOLE = Request((Message("user", "Why?"),), temperature=0, max_tokens=100)
STOPPED = replace(WHOLE, stop=("Question:", "\n\n"))
LONG = "42.\n\nQuestion: what follows is paid for and of no use to anybody at all"


@pytest.mark.parametrize(
    ("text", "stops", "left"),
    [
        ("a b c", (), "a b c"),
        ("a b c", ("",), "a b c"),
        ("a b c", ("d", "c", "b"), "a "),
        ("stop", ("stop",), ""),
        ("a\n\nb", ("\n\n", "\n"), "a"),  # the first newline completes the second one
        ("aXbc", ("Xbc", "b"), "aX"),  # who writes letter by letter never comes to c
        ("a\nQ: b", ("Q:", "\nQ:"), "a\n"),  # both at once: the first named
        ("a\nQ: b", ("\nQ:", "Q:"), "a"),
    ],
)
def test_a_text_ends_before_the_first_complete_stop(text: str, stops: Sequence[str], left: str) -> None:
    place = first_stop(text, stops)
    assert text[: place.start if place else None] == left
    one_by_one = next((text[:n] for n in range(len(text) + 1) if any(s and s in text[:n] for s in stops)), text)
    assert one_by_one.startswith(left)
    assert cut_at_stop(Reply(text, "length", "m"), stops).finish_reason == ("stop" if place else "length")


# the store


def test_requests_without_stops_have_the_keys_and_rows_they_had(tmp_path: Path) -> None:
    assert len({request_key("m", one) for one in (WHOLE, STOPPED, replace(WHOLE, stop=("Question:",)))}) == 3
    assert request_key("m", replace(WHOLE, top_logprobs=1)) != request_key("m", replace(WHOLE, stop=("1",)))
    with ReplyStore(tmp_path / "replies.sqlite") as store:
        store.put([Entry("m", WHOLE, Reply("42", "stop", "m")), Entry("m", STOPPED, Reply("42", "stop", "m"))])
        rows = [json.loads(row) for (row,) in sqlite3.connect(store.path).execute("select request from replies")]
        assert ["stop" in row for row in rows] == [False, True]
        with ReplyStore(tmp_path / "other.sqlite") as other:
            assert other.merge(store.path).added == 2
            assert other.find("m", replace(STOPPED, max_tokens=200)) == Reply("42", "stop", "m")


@pytest.mark.parametrize(
    ("text", "finish_reason", "tokens", "limit", "kept"),
    [
        (LONG, "stop", 30, 100, "42."),
        (LONG, "length", 100, 100, "42."),
        ("42, and so", "length", 100, 100, "42, and so"),
        (LONG, "stop", 30, 400, "42."),
        (LONG, "length", 100, 400, None),  # it may be asked again: a text that was cut serves its own limit
        (LONG, "stop", 30, 20, None),
    ],
)
def test_a_whole_text_that_is_stored_serves_a_request_with_stops(
    tmp_path: Path, text: str, finish_reason: str, tokens: int, limit: int, kept: str | None
) -> None:
    with ReplyStore(tmp_path / "replies.sqlite") as store:
        store.put([Entry("m", WHOLE, Reply(text, finish_reason, "m", usage=Usage(5, tokens)))])
        found = store.find("m", replace(STOPPED, max_tokens=limit))
        assert (found.text if found else None) == kept
        store.put([Entry("m", STOPPED, Reply("asked", "stop", "m"))])
        assert store.find("m", WHOLE) == Reply(text, finish_reason, "m", usage=Usage(5, tokens))


# an endpoint


def ask(server: FaultServer, *requests: Request, purse: Purse | None = None, **settings: Any) -> list[Reply]:
    async def main() -> list[Reply]:
        chosen = {"model": "gpt-test", "base_url": server.base_url, **settings}
        chat = OpenAIChat(EndpointSettings.model_validate(chosen), purse=purse)
        try:
            return [await chat.reply(request) for request in requests]
        finally:
            await chat.close()

    return asyncio.run(main())


def obeys(text: str) -> Act:
    """Stops where it is told to, as OpenAI does."""

    async def act(request: web.Request) -> web.StreamResponse:
        stops = (await request.json()).get("stop", [])
        place = first_stop(text, stops)
        return web.json_response(completion(text[: place.start if place else None]))

    return act


def test_an_endpoint_is_told_four_and_the_others_cut_here(server: FaultServer) -> None:
    server.always = obeys("one two three four five six")
    [reply] = ask(server, replace(WHOLE, stop=("", "seven", "six", "five", "eight", "four")))
    assert server.seen[0].body["stop"] == ["seven", "six", "five", "eight"]
    assert (reply.text, reply.finish_reason) == ("one two three ", "stop")
    assert reply.raw["choices"][0]["message"]["content"] == "one two three four "
    ask(server, WHOLE)
    assert "stop" not in server.seen[1].body


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, {"message": "Unsupported parameter: 'stop' is not supported with this model.", "param": "stop"}),
        (400, {"message": "Invalid 'stop': array too long. Expected an array with maximum length 2", "param": "stop"}),
        (400, {"message": "stop_sequences: each stop sequence must contain non-whitespace"}),
        (422, {"message": "Extra inputs are not permitted: stop"}),
    ],
)
def test_one_that_refuses_stops_is_asked_without(
    server: FaultServer, status: int, error: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    server.script, server.always = [fails(status, error)], says(LONG)
    replies = ask(server, STOPPED, STOPPED)
    assert [reply.text for reply in replies] == ["42.", "42."]
    assert ["stop" in seen.body for seen in server.seen] == [True, False, False]
    assert [record.getMessage().endswith("cut when they are here") for record in caplog.records] == [True]


def test_a_complaint_about_another_parameter_leaves_stops_alone(server: FaultServer) -> None:
    server.script = [fails(400, {"message": "Unsupported parameter 'seed'; this model takes 'stop'"})]
    server.always = says(LONG)
    ask(server, replace(STOPPED, temperature=0.5))
    assert [("seed" in seen.body, "stop" in seen.body) for seen in server.seen] == [(True, True), (False, True)]


def test_what_is_refused_though_the_settings_want_it_is_not_asked_for_ever(server: FaultServer) -> None:
    server.always = fails(400, {"message": "Unsupported parameter: 'stop'", "param": "stop"})
    with pytest.raises(ReplyError, match="refused the request"):
        ask(server, STOPPED, extra_body={"stop": ["mine"]})
    assert len(server.seen) == 1


def test_an_endpoint_that_writes_on_is_told_of_once(server: FaultServer, caplog: pytest.LogCaptureFixture) -> None:
    server.always = says("42.\n\nQu")  # one that sends the token that completes it, as transformers serve does
    assert [reply.text for reply in ask(server, STOPPED)] == ["42."]
    assert not caplog.records
    server.always = says(LONG)
    assert [reply.text for reply in ask(server, STOPPED, STOPPED)] == ["42.", "42."]
    assert ["takes no notice of stop strings" in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("ended", [says(None, reasoning_content="Let me see."), says("<think>Let me see.")])
def test_a_stop_within_thoughts_ends_no_answer(server: FaultServer, ended: Act) -> None:
    server.script = [ended]
    server.always = says("<think>Let me see.\n\nGood.</think>\n\n42.\n\nQuestion: more")
    purse = Purse(None)
    price = {"input": 0, "output": 1e4}
    first, second = ask(server, STOPPED, STOPPED, purse=purse, price=price)
    assert (first.text, second.text) == ("42.", "42.")
    assert first.reasoning == "Let me see.\n\nGood."
    assert ["stop" in seen.body for seen in server.seen] == [True, False, False]
    # it was paid for; how much is known from above
    assert sum(spending.usd for spending in purse.take_unlisted() if spending.basis == "unsure") == 1.0


# batches


def test_a_batch_carries_stops_and_its_replies_end_there(tmp_path: Path) -> None:
    settings = EndpointSettings(model="m", price=Price(input=0, output=1e4))
    asked = [Asked(request_key("m", one), one, request_body(settings, one)) for one in (STOPPED, WHOLE)]
    batch = Batch(tmp_path, "batch-0001", State("http://127.0.0.1:9/v1", "m", 3, 0.0))
    batch.write(asked)
    assert list(batch.asked()) == asked
    lines = [json.loads(line) for line in batch.requests.read_text().splitlines()]
    assert [line["body"].get("stop") for line in lines] == [["Question:", "\n\n"], None]
    rows = [
        {"custom_id": line["custom_id"], "response": {"status_code": 200, "body": completion(LONG)}} for line in lines
    ]
    batch.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with ReplyStore(tmp_path / "replies.sqlite") as store:
        results = BatchResults(settings, settings.price, store, Purse(None))

        async def keep() -> None:
            async for outcomes in results.read(batch):
                await results.keep(outcomes)

        asyncio.run(keep())
        texts = [reply.text for one in (STOPPED, WHOLE) if (reply := store.find("m", one))]
    assert texts == ["42.", LONG]


# in this process


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("models") / "llama", "llama")


def answers(folder: Path, requests: Sequence[Request]) -> list[Reply]:
    async def run() -> list[Reply]:
        chat = LocalChat(folder, batch_size=8)
        try:
            return await asyncio.gather(*map(chat.reply, requests))
        finally:
            await chat.close()

    return asyncio.run(run())


def test_a_model_in_this_process_stops_where_the_whole_answer_is_cut(folder: Path) -> None:
    wholes = [
        Request((Message("user", f"Add {n}"),), temperature=float(n % 2), max_tokens=60, index=n) for n in range(12)
    ]
    replies = answers(folder, wholes)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    requests = []
    for place, (whole, reply) in enumerate(zip(wholes, replies, strict=True)):
        at = 3 + 4 * place % max(1, len(reply.text) - 6)  # strings across tokens, wherever they fall
        stops = (reply.text[at : at + 3], "never written")
        requests.append(replace(whole, stop=stops if place else ("never written",)))
        assert noise_key(whole) == noise_key(requests[-1])
    stopped = answers(folder, requests)
    expected = [cut_at_stop(reply, one.stop) for reply, one in zip(replies, requests, strict=True)]
    assert [(reply.text, reply.finish_reason) for reply in stopped] == [(e.text, e.finish_reason) for e in expected]
    assert sum(reply.text != whole.text for reply, whole in zip(stopped, replies, strict=True)) == 11
    for one, reply, whole in zip(requests, stopped, replies, strict=True):
        ids = reply.raw["token_ids"]
        assert (len(ids), ids) == (reply.usage.completion_tokens, whole.raw["token_ids"][: len(ids)])
        if reply.text != whole.text:  # the last token is the one that completes the string
            assert one.stop[0] in tokenizer.decode(ids, skip_special_tokens=True)
            assert one.stop[0] not in tokenizer.decode(ids[:-1], skip_special_tokens=True)


def test_it_is_what_transformers_own_stop_strings_give(folder: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    [whole] = answers(folder, [WHOLE])
    stop = next(match[0] for match in re.finditer(r"[a-z ]{4}", whole.text[20:]))
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    how = GenerationConfig(max_new_tokens=100, stop_strings=[stop], pad_token_id=0, eos_token_id=tokenizer.eos_token_id)
    written = model.generate(**ids, generation_config=how, tokenizer=tokenizer)[0, ids["input_ids"].shape[1] :]
    [ours] = answers(folder, [replace(WHOLE, stop=(stop,))])
    assert ours.raw["token_ids"] == written.tolist()
    assert tokenizer.decode(written, skip_special_tokens=True).partition(stop)[0] == ours.text


def test_a_special_token_stops_though_no_text_holds_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = save_folder(tmp_path / "model", "llama")
    many = [replace(WHOLE, index=n, temperature=2.0) for n in range(24)]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start, end = tokenizer.convert_tokens_to_ids([START, END])
    wholes = answers(folder, many)
    assert any(start in reply.raw["token_ids"] for reply in wholes)
    for whole, stopped in zip(wholes, answers(folder, [replace(one, stop=(START,)) for one in many]), strict=True):
        ids = whole.raw["token_ids"]
        until = ids[: ids.index(start) + 1] if start in ids else ids
        assert stopped.raw["token_ids"] == until
        assert stopped.text == tokenizer.decode(until, skip_special_tokens=True)
        assert stopped.finish_reason == ("stop" if until[-1] in (start, end) else "length")


def test_thoughts_that_the_template_begins_are_not_stopped(tmp_path: Path) -> None:
    plain = save_folder(tmp_path / "plain", "llama")
    thinking = save_folder(
        tmp_path / "thinking", "llama", chat_template=CHATML.replace("assistant\n'", "assistant\n<think>\n'")
    )
    [whole] = answers(thinking, [WHOLE])
    stop = whole.text[10:12]
    [within] = answers(thinking, [replace(WHOLE, stop=(stop,))])
    assert within.text == cut_at_stop(whole, (stop,)).text
    assert within.raw["token_ids"] == whole.raw["token_ids"]  # who knows whether the answer comes yet
    [cut] = answers(plain, [replace(WHOLE, stop=(stop,))])
    assert stop not in cut.text
