"""The reply in the JSON of a chat completion, however the endpoint dresses it. JSON in, `Reply` or `Fault` out."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from anchored.llm.chat import Reply, Usage
from anchored.llm.faults import Fault, fault_of_status

# what some endpoints say for "stop" and "length"
FINISH_REASONS = {
    "eos": "stop",
    "eos_token": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
}


_UTF8_MARK = b"\xef\xbb\xbf"
_SHOWN = 80


@dataclass(frozen=True, slots=True)
class Content:
    """What a model wrote, taken apart."""

    answer: str
    thinking: str = ""


def read_body(body: bytes) -> Any:
    """The JSON of a response, also of one that was streamed unasked. Raises ValueError, which shows its beginning."""
    text = body.removeprefix(_UTF8_MARK).strip()
    if text.startswith((b"data:", b"event:", b":")):
        return _unstreamed(text)
    try:
        return json.loads(text)
    except ValueError:
        shown = " ".join(text[:_SHOWN].decode("utf-8", "replace").split())
        raise ValueError(f"{shown!r}" if shown else "it is empty") from None


def read_reply(payload: Any, model: str, max_tokens: int, seconds: float) -> Reply | Fault:
    """The reply in a response to a request for `max_tokens` of `model`; a fault if there is none in it."""
    if not isinstance(payload, dict):
        return Fault("again", "the reply is no JSON object")
    choices = payload.get("choices")
    if not choices and isinstance(payload.get("error"), dict):  # some gateways send errors with status 200
        code = payload["error"].get("code")
        return fault_of_status(code if isinstance(code, int) and 400 <= code < 600 else 502, {}, payload)
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        return Fault("again", "the reply holds no message")
    if choice.get("finish_reason") == "error":
        return Fault("again", "the endpoint broke off the reply")
    content = _join_parts(message.get("content"))
    parts = split_thinking(content.answer)
    thinking = (message.get("reasoning_content") or message.get("reasoning"), content.thinking, parts.thinking)
    usage = _usage(payload.get("usage"))
    return Reply(
        text=_valid(parts.answer).removeprefix("\ufeff"),
        finish_reason=_finish_reason(choice, message, usage, max_tokens),
        model=str(payload.get("model") or model),
        reasoning=_valid("\n".join(part for part in thinking if isinstance(part, str) and part)),
        usage=usage,
        seconds=seconds,
        logprobs=_logprobs(choice.get("logprobs")),
        raw=payload,
    )


def _unstreamed(events: bytes) -> dict[str, Any]:
    """Server-sent events as the completion whose pieces they are; without a choice in it where they broke off."""
    whole: dict[str, Any] = {}
    message: dict[str, Any] = {}
    finish, done = None, False
    for line in events.splitlines():
        name, _, data = line.partition(b":")
        if name != b"data" or data.strip() == b"[DONE]":
            done |= name == b"data"
            continue
        chunk = json.loads(data)
        choices = chunk.pop("choices", None) if isinstance(chunk, dict) else None
        whole |= {key: value for key, value in chunk.items() if value} if isinstance(chunk, dict) else {}
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        finish = choice.get("finish_reason") or finish
        delta = choice.get("delta")
        for key, piece in delta.items() if isinstance(delta, dict) else ():
            before = message.get(key)
            joins = key != "role" and isinstance(piece, str) and isinstance(before, str)
            message[key] = f"{before}{piece}" if joins else piece or before
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return whole | {"choices": [choice]} if finish or done else whole


def split_thinking(content: str) -> Content:
    """The answer and the thinking text before it: `<think>...</think>` at the start.

    Thinking that was cut short has no answer. Some models' templates write the opening tag themselves, so that only
    the closing one comes back.
    """
    opened = content.lstrip().startswith("<think>")
    if not opened and ("<think>" in content or content.count("</think>") != 1):
        return Content(content)
    thinking, _, answer = content.partition("</think>")
    return Content(answer.lstrip(), thinking.strip().removeprefix("<think>").strip())


def _join_parts(content: Any) -> Content:
    """A message's content, which may be a string, null, or a list of typed parts."""
    if not isinstance(content, list):
        return Content(content if isinstance(content, str) else "")
    texts = {"text": "", "thinking": ""}
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in texts:
            value = part.get(kind)
            texts[kind] += value if isinstance(value, str) else _join_parts(value).answer
    return Content(texts["text"], texts["thinking"])


def _finish_reason(choice: dict[str, Any], message: dict[str, Any], usage: Usage, max_tokens: int) -> str:
    if message.get("refusal") and not message.get("content"):
        return "content_filter"
    said = choice.get("finish_reason")
    if not isinstance(said, str) or not said:
        return "length" if usage.completion_tokens >= max_tokens else "stop"
    return FINISH_REASONS.get(said, said)


def _logprobs(logprobs: Any) -> tuple[dict[str, float], ...]:
    """The likeliest tokens of each place; what is no number counts as not told."""
    places = logprobs.get("content") if isinstance(logprobs, dict) else None
    return tuple(map(_likeliest, places)) if isinstance(places, list) else ()


def _likeliest(place: Any) -> dict[str, float]:
    told = place.get("top_logprobs") if isinstance(place, dict) else None
    found: dict[str, float] = {}
    for one in told if isinstance(told, list) else []:
        token, value = (one.get("token"), one.get("logprob")) if isinstance(one, dict) else (None, None)
        if isinstance(value, float) and math.isnan(value):
            return {}  # what stands beside it came of the same arithmetic
        if isinstance(token, str) and isinstance(value, int | float) and math.isfinite(value):
            # several byte sequences that are no text may look the same
            found[_valid(token)] = max(float(value), found.get(_valid(token), -math.inf))
    return found


def _usage(usage: Any) -> Usage:
    counts = usage if isinstance(usage, dict) else {}
    details = counts.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else counts.get("prompt_cache_hit_tokens")
    prompt = _count(counts.get("prompt_tokens"))
    # some count thinking in the total alone
    completion = max(_count(counts.get("completion_tokens")), _count(counts.get("total_tokens")) - prompt)
    return Usage(prompt, completion, min(_count(cached), prompt))


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _valid(text: str) -> str:
    """Text that every file can hold: half of a surrogate pair, where an endpoint cut one, becomes a question mark."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode("utf-8")
    return text
