"""The real `transformers serve` on the CPU: requests get what they ask for, whatever its generation config says."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import processes
import pytest
from tiny_models import save_folder

from anchored.llm.chat import Reply, Request
from anchored.llm.local_chat import LocalChat
from anchored.llm.serve import Served
from anchored.llm.served_chat import ServedChat
from anchored.llm.settings import SampleSettings
from anchored.records import Message

QUESTIONS = [(Message("user", f"How many coins make {n} cents?"),) for n in range(4)]
SAMPLE = SampleSettings(temperature=1.0, max_tokens=24, serve="transformers")


@dataclass
class Seen:
    greedy: list[Reply]
    drawn: list[list[Reply]]
    """Samples 0 and 1 of each question."""
    again: list[list[Reply]]
    in_process: list[Reply]
    stopped: Reply
    """The first question's greedy answer, with its middle as a stop string."""
    log: str


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """All that is asked, of one server: its start takes seconds."""
    place = tmp_path_factory.mktemp("served")
    folder = save_folder(place / "model")
    # what makes `transformers serve` answer greedily at any temperature, and with a penalty at that
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"do_sample": False, "repetition_penalty": 5.0}))

    async def ask() -> Seen:
        chat = ServedChat(
            Served("transformers", folder, "tiny", place / "serve-tiny.log", {"device": "cpu"}),
            SAMPLE.endpoint("tiny"),
            lambda _: None,
        )
        local = LocalChat(folder, batch_size=8)

        async def samples() -> list[list[Reply]]:
            requests = [[SAMPLE.request(question, index=index, seed=7) for index in (0, 1)] for question in QUESTIONS]
            return [list(await asyncio.gather(*map(chat.reply, both))) for both in requests]

        try:
            greedy = [Request(question, temperature=0, max_tokens=24) for question in QUESTIONS]
            answers = await asyncio.gather(*map(chat.reply, greedy))
            return Seen(
                greedy=answers,
                stopped=await chat.reply(replace(greedy[0], stop=(middle(answers[0].text),))),
                drawn=await samples(),
                again=await samples(),
                in_process=await asyncio.gather(*map(local.reply, greedy)),
                log=(place / "serve-tiny.log").read_text(),
            )
        finally:
            await local.close()
            await chat.close()

    found = asyncio.run(ask())
    assert not processes.having(str(place))
    return found


def middle(text: str) -> str:
    """Some plain letters of a text."""
    return max(re.findall("[a-z ]{2,4}", text[4:-4]), key=len)


def test_temperature_0_is_greedy_as_in_this_process(seen: Seen) -> None:
    assert [reply.text for reply in seen.greedy] == [reply.text for reply in seen.in_process]
    assert {reply.model for reply in seen.greedy} == {"tiny"}


def test_a_stop_string_ends_an_answer_before_it(seen: Seen) -> None:
    [whole, *_] = seen.greedy
    assert seen.stopped.text == whole.text.partition(middle(whole.text))[0]
    assert seen.stopped.usage.completion_tokens < whole.usage.completion_tokens
    assert seen.stopped.finish_reason == "stop"


def test_samples_are_drawn_and_differ_by_index(seen: Seen) -> None:
    assert all(first.text != second.text for first, second in seen.drawn)
    assert all(first.text != greedy.text for (first, _), greedy in zip(seen.drawn, seen.greedy, strict=True))


def test_a_seed_draws_the_same_sample_again(seen: Seen) -> None:
    assert [[reply.text for reply in both] for both in seen.again] == [
        [reply.text for reply in both] for both in seen.drawn
    ]


def test_length_and_usage_are_as_asked(seen: Seen) -> None:
    replies = [*seen.greedy, *(reply for both in seen.drawn for reply in both)]
    assert all(0 < reply.usage.completion_tokens <= 24 for reply in replies)
    assert all((reply.finish_reason == "length") == (reply.usage.completion_tokens == 24) for reply in replies)
    assert "Ignoring unsupported fields" not in seen.log


def test_continuous_batching_draws_too(tmp_path: Path) -> None:
    """There the first request decides for all how they are drawn: the server is greeted as it will be asked."""
    folder = save_folder(tmp_path / "model")
    options = {"device": "cpu", "continuous-batching": True, "cb-num-blocks": 64, "cb-max-batch-tokens": 512}

    async def ask() -> list[Reply]:
        chat = ServedChat(
            Served("transformers", folder, "tiny", tmp_path / "log", options), SAMPLE.endpoint("tiny"), lambda _: None
        )
        requests = [SAMPLE.request(question, index=index) for question in QUESTIONS for index in (0, 1)]
        try:
            return await asyncio.gather(*map(chat.reply, requests))
        finally:
            await chat.close()

    replies = asyncio.run(ask())
    assert all(first.text != second.text for first, second in zip(replies[::2], replies[1::2], strict=True))
    assert all(0 < reply.usage.completion_tokens <= 24 for reply in replies)
