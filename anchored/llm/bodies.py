"""What a request is at an endpoint: the JSON that is sent, live or in a batch, and whose replies count as the same."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from anchored.llm.chat import Request
from anchored.llm.settings import EndpointSettings
from anchored.llm.stops import sent_stops
from anchored.records import content_hash


def fingerprint(settings: EndpointSettings) -> str:
    """The model's name, and what is sent beside: the same model at another address or proxy is not paid for again."""
    return f"{settings.model} {content_hash(settings.extra_body)}" if settings.extra_body else settings.model


def request_body(settings: EndpointSettings, request: Request, refused: Collection[str] = ()) -> dict[str, Any]:
    """The JSON of a chat completion, without the parameters that the model was found to refuse."""
    body: dict[str, Any] = {
        "model": settings.model,
        "messages": [{"role": message.role, "content": message.content} for message in request.messages],
        "temperature": request.temperature,
    }
    body["max_completion_tokens" if "max_tokens" in refused else "max_tokens"] = request.max_tokens
    if request.top_p != 1:  # some models take either of the two, not both
        body["top_p"] = request.top_p
    if request.top_logprobs and not {"logprobs", "top_logprobs"} & set(refused):
        body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    if stops := sent_stops(request.stop):
        body["stop"] = stops
    if settings.send_seed and request.temperature > 0:
        body["seed"] = _seed(request)
    return {name: value for name, value in body.items() if name not in refused} | settings.extra_body


def _seed(request: Request) -> int:
    """A seed of 31 bits, another for each prompt and each sample of it."""
    turns = [[message.role, message.content] for message in request.messages]
    return int(content_hash([request.seed, request.index, turns])[:8], 16) & 0x7FFFFFFF
