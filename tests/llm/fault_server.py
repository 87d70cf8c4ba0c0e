"""A real HTTP server on loopback that answers chat completions by a script, and writes down what it saw."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from loopback import Loopback

Act = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Seen:
    """One request as the server saw it."""

    at: float
    body: dict[str, Any]
    headers: dict[str, str]


@dataclass
class FaultServer(Loopback):
    """Plays `script` one act per request, then `always`."""

    script: list[Act] = field(default_factory=list)
    always: Act | None = None
    seen: list[Seen] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._answer)
        app.router.add_get("/v1/models", self._models)
        return app

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.seen.append(Seen(time.monotonic(), await request.json(), dict(request.headers)))
        act = self.script.pop(0) if self.script else self.always or says("fine")
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await act(request)
        finally:
            self.in_flight -= 1

    async def _models(self, request: web.Request) -> web.StreamResponse:
        return await self.always(request) if self.always else web.json_response({"data": []})


def completion(content: Any, *, finish_reason: str | None = "stop", **message: Any) -> dict[str, Any]:
    """A chat completion as an endpoint sends it."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "served-model",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": content, **message},
                "finish_reason": finish_reason,
            }
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }


def says(content: Any, *, after: float = 0.0, **message: Any) -> Act:
    async def act(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(after)
        return web.json_response(completion(content, **message))

    return act


def answers_together(server: FaultServer, count: int, then: Act) -> Act:
    """Holds every request until so many are there at once, for half a minute at most; then none any more."""
    there = asyncio.Event()

    async def act(request: web.Request) -> web.StreamResponse:
        if server.in_flight == count:
            there.set()
        with suppress(TimeoutError):
            await asyncio.wait_for(there.wait(), 30)
        there.set()
        return await then(request)

    return act


def fails(status: int, error: Any = None, headers: Mapping[str, str] | None = None) -> Act:
    async def act(_: web.Request) -> web.StreamResponse:
        return web.json_response({"error": error or {"message": f"no luck ({status})"}}, status=status, headers=headers)

    return act


def sends(text: str, content_type: str = "application/json", status: int = 200) -> Act:
    async def act(_: web.Request) -> web.StreamResponse:
        return web.Response(text=text, content_type=content_type, status=status)

    return act


def cuts(beginning: bytes = b'{"choices": [{"message": {"content": "half of') -> Act:
    """Promises 1000 bytes, sends a few and hangs up."""

    async def act(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000", "Content-Type": "application/json"})
        await response.prepare(request)
        await response.write(beginning)
        _hang_up(request)
        return response

    return act


def hangs_up() -> Act:
    async def act(request: web.Request) -> web.StreamResponse:
        _hang_up(request)
        return web.Response()

    return act


def hangs(begun: Callable[[], object] = lambda: None) -> Act:
    """Never answers; calls `begun` when it begins not to."""

    async def act(_: web.Request) -> web.StreamResponse:
        begun()
        await asyncio.sleep(3600)
        raise AssertionError

    return act


def trickles(seconds: float, begun: Callable[[], object] = lambda: None) -> Act:
    """Sends a byte now and then: no single read ever times out; calls `begun` after some."""

    async def act(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        for sent in range(round(seconds / 0.05)):
            if sent == 3:
                begun()
            await response.write(b" ")
            await asyncio.sleep(0.05)
        return response

    return act


def echoes_headers(status: int) -> Act:
    async def act(request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": f"bad headers {dict(request.headers)}"}}, status=status)

    return act


def _hang_up(request: web.Request) -> None:
    assert request.transport is not None
    request.transport.close()
