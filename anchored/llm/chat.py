"""The one protocol of everything that answers: `await chat.reply(request)`.

Behind it stand an endpoint (`openai_chat`), a model in this process (`local_chat`), the reply store (`replies`), or a
test's function. Concurrency is the caller's: as many `reply` calls as it likes, each chat bounds what is in flight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from anchored.records import Message


@dataclass(frozen=True, slots=True)
class Request:
    """One question to a model, with all that determines its reply."""

    messages: tuple[Message, ...]
    temperature: float = 0.7
    """0 is greedy."""
    top_p: float = 1.0
    max_tokens: int = 1024
    index: int = 0
    """Which sample this is, where one prompt is asked several times: other index, other reply."""
    seed: int = 0
    top_logprobs: int = 0
    """How many of the likeliest tokens to tell at each place of the reply, with their log-probabilities; 0: none."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these that it would hold (`stops`)."""

    @classmethod
    def from_json(cls, messages: Iterable[Mapping[str, Any]], fields: Mapping[str, Any]) -> Self:
        """The request whose fields were written as JSON, its messages perhaps elsewhere."""
        turns = tuple(Message(**message) for message in messages)
        return cls(**{**fields, "messages": turns, "stop": tuple(fields.get("stop", ()))})


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one reply, as the endpoint counted them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    """Those of thinking count."""
    cached_tokens: int = 0
    """Of the prompt's tokens, those that the endpoint had kept from before."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model sent back."""

    text: str
    """The answer, without thinking text; empty if there was none."""
    finish_reason: str
    """stop | length | content_filter | whatever the endpoint says."""
    model: str
    """The name that the endpoint gave."""
    reasoning: str = ""
    """Thinking text that came apart from the answer (`reasoning_content`, a leading <think> block)."""
    usage: Usage = field(default_factory=Usage)
    seconds: float = 0.0
    raw: dict[str, Any] = field(default_factory=dict)
    """The reply as it came, JSON-able: what was paid for is kept whole, so a changed parser needs no new call."""
    logprobs: tuple[dict[str, float], ...] = ()
    """At each place of the text, the likeliest tokens and their log-probabilities, where the request wants them and
    who answers can tell."""


class Chat(Protocol):
    """Something that answers."""

    name: str
    """The model's name, for people and provenance columns."""
    fingerprint: str
    """What distinguishes its replies in the store: the model's name at an endpoint, the weights' hash of a folder."""

    async def reply(self, request: Request) -> Reply:
        """The model's reply.

        Raises ReplyError when this request got none (the row's outcome), ModelError when no request can succeed
        (wrong key, unknown model, nothing listens), Stopped when the endpoint went down or its quota is spent.
        """
        ...

    async def close(self) -> None:
        """Free connections, threads or the model; idempotent."""
        ...
