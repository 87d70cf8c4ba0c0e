"""Chat completions as endpoints really dress them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fault_server import completion

from anchored.llm.chat import Reply, Usage
from anchored.llm.faults import Fault
from anchored.llm.responses import read_body, read_reply


def read(payload: Any, max_tokens: int = 100) -> Reply:
    reply = read_reply(payload, "asked-model", max_tokens, 1.5)
    assert isinstance(reply, Reply), reply
    return reply


@pytest.mark.parametrize(
    ("message", "text", "reasoning"),
    [
        ({"content": "plain"}, "plain", ""),
        ({"content": None}, "", ""),
        ({}, "", ""),
        ({"content": "answer", "reasoning_content": "thoughts"}, "answer", "thoughts"),
        ({"content": "answer", "reasoning": "thoughts"}, "answer", "thoughts"),
        ({"content": None, "reasoning_content": "only thoughts"}, "", "only thoughts"),
        ({"content": "<think>\nhm, [1]?\n</think>\n\nanswer [2]"}, "answer [2]", "hm, [1]?"),
        ({"content": "\n<think></think>answer"}, "answer", ""),
        ({"content": "<think>cut short"}, "", "cut short"),
        ({"content": "opened by the template</think>\nanswer"}, "answer", "opened by the template"),
        ({"content": "Write <think>aloud</think> like so."}, "Write <think>aloud</think> like so.", ""),
        ({"content": "</think> and </think>"}, "</think> and </think>", ""),
        ({"content": "<think>a</think>b", "reasoning_content": "c"}, "b", "c\na"),
        (
            {
                "content": [
                    {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                    {"type": "text", "text": "b"},
                ]
            },
            "b",
            "hm",
        ),
        (
            {"content": [{"type": "text", "text": "a"}, {"type": "image"}, "odd", {"type": "text", "text": "b"}]},
            "ab",
            "",
        ),
        ({"content": "cut \ud83d emoji"}, "cut ? emoji", ""),
    ],
)
def test_answer_and_thinking_come_apart(message: dict[str, Any], text: str, reasoning: str) -> None:
    payload = completion(None)
    payload["choices"][0]["message"] = message
    reply = read(payload)
    assert (reply.text, reply.reasoning) == (text, reasoning)
    assert reply.raw == payload


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ("stop", "stop"),
        ("eos", "stop"),
        ("end_turn", "stop"),
        ("length", "length"),
        ("max_tokens", "length"),
        ("tool_calls", "tool_calls"),
    ],
)
def test_finish_reasons_are_called_one_way(said: str, means: str) -> None:
    assert read(completion("a", finish_reason=said)).finish_reason == means


def test_a_missing_finish_reason_is_told_from_the_tokens() -> None:
    assert read(completion("a", finish_reason=None), max_tokens=100).finish_reason == "stop"
    assert read(completion("a", finish_reason=None), max_tokens=3).finish_reason == "length"


def test_a_refusal_apart_from_the_content_is_a_content_filter() -> None:
    assert read(completion(None, refusal="I can't help with that.")).finish_reason == "content_filter"


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": None, "completion_tokens": "3"}, []])
def test_missing_usage_counts_as_none(usage: Any) -> None:
    assert read(completion("a") | {"usage": usage}).usage == Usage(0, 0)


def test_the_asked_models_name_stands_in_for_a_missing_one() -> None:
    assert read(completion("a") | {"model": None}).model == "asked-model"


@pytest.mark.parametrize(
    "payload",
    [
        None,
        7,
        [],
        "",
        "<html>",
        {},
        {"choices": None},
        {"choices": {}},
        {"choices": [None]},
        {"choices": [{}]},
        {"choices": [{"message": "text"}]},
        {"error": {"message": "upstream", "code": 502}},
        {"error": {"message": "upstream", "code": "bad_gateway"}},
    ],
)
def test_what_holds_no_reply_is_asked_for_again(payload: Any) -> None:
    fault = read_reply(payload, "m", 10, 0.0)
    assert isinstance(fault, Fault)
    assert fault.follows == "again"


def test_an_error_behind_status_200_means_what_its_code_says() -> None:
    fault = read_reply({"error": {"message": "slow down", "code": 429}}, "m", 10, 0.0)
    assert isinstance(fault, Fault)
    assert (fault.follows, fault.reason) == ("throttled", "429: slow down")


def streamed(*chunks: Any, end: str = "data: [DONE]\n\n") -> bytes:
    return f": processing\n\n{''.join(f'data: {json.dumps(chunk)}{2 * chr(10)}' for chunk in chunks)}{end}".encode()


def test_a_reply_that_was_streamed_unasked_is_put_together() -> None:
    pieces = [
        {"role": "assistant", "content": ""},
        {"content": "two "},
        {"reasoning_content": "hm"},
        {"content": "parts"},
    ]
    chunks = [{"model": "m", "choices": [{"index": 0, "delta": piece, "finish_reason": None}]} for piece in pieces]
    last = {
        "choices": [{"delta": {}, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 2},
    }
    reply = read(read_body(streamed(*chunks, last)))
    assert (reply.text, reply.reasoning, reply.finish_reason) == ("two parts", "hm", "length")
    assert reply.usage == Usage(prompt_tokens=5, completion_tokens=2)


@pytest.mark.parametrize(
    "body",
    [
        streamed({"choices": [{"delta": {"content": "half of"}}]}, end=""),
        streamed(None, [], {"choices": {}}, {"choices": [None]}, {"choices": [{"delta": "odd"}]}, end=""),
        streamed({"error": {"message": "upstream", "code": 502}}, end=""),
    ],
)
def test_a_stream_that_broke_off_is_asked_for_again(body: bytes) -> None:
    fault = read_reply(read_body(body), "m", 10, 0.0)
    assert isinstance(fault, Fault)
    assert fault.follows == "again"


def test_what_is_no_json_shows_how_it_begins() -> None:
    with pytest.raises(ValueError, match=r"^'<html> Welcome"):
        read_body(b"<html>\n  Welcome to nginx")


def test_a_byte_order_mark_is_no_part_of_an_answer() -> None:
    assert read(completion("\ufeffanswer")).text == "answer"
