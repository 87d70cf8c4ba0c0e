"""The pocket teacher behind a real HTTP endpoint on loopback, in OpenAI's chat completions schema.

    with Teacher() as teacher:
        client = openai.AsyncOpenAI(base_url=teacher.base_url, api_key="any")

or by hand: `python -m anchored.pocket.teacher --port 8000 --rate-limited 0.1`. What it says is in `teaching`; here it
is served, counted in `teacher.requests`, and made to misbehave as `Faults` say. The same request has the same answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import threading
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Annotated, Any

from aiohttp import web
from pydantic import Field, ValidationError

from anchored.errors import ModelError
from anchored.pocket.teaching import REFUSAL, Lesson, Part, teach
from anchored.records import content_hash
from anchored.settings import Settings

MODEL = "pocket-teacher"

Share = Annotated[float, Field(ge=0, le=1)]


class Faults(Settings):
    """How the teacher misbehaves. A share names how many of the different requests are struck."""

    rate_limited: Share = 0.0
    """Answers 429 with `Retry-After`."""
    retry_after: float = 0.05
    """Seconds that a 429 asks to wait."""
    server_error: Share = 0.0
    """Answers 500."""
    cut_body: Share = 0.0
    """Closes the connection in the middle of the JSON."""
    slow: Share = 0.0
    """Answers rightly, after `slow_seconds`."""
    slow_seconds: float = 5.0
    """How long a slow answer takes."""
    struck_attempts: int = 1
    """How many attempts at one request these strike: a later attempt succeeds."""
    no_header: Share = 0.0
    """A revision without its identifier."""
    repeated_header: Share = 0.0
    """A revision given twice, each under the identifier."""
    leak: Share = 0.0
    """A revision that speaks of being one."""
    refusal: Share = 0.0
    """Declines to help."""
    truncated: Share = 0.0
    """Stops half way, with finish_reason `length`."""
    empty: Share = 0.0
    """An answer without text."""
    unauthorized: bool = False
    """Answers 401 to everything."""
    forbidden: bool = False
    """Answers 403 to everything."""
    quota_exhausted: bool = False
    """Answers 429 `insufficient_quota` to everything."""
    down_after: int | None = None
    """Closes every connection without a word after this many requests."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One request that reached the server, and what became of it."""

    content: str
    """Hash of the request's body: equal for equal questions."""
    attempt: int
    """0 for the first time that this content came."""
    part: Part
    status: int
    """0 where the connection was closed instead."""
    fault: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """Of the reply, as it says itself."""


class Teacher:
    """The endpoint, in a thread of its own while the context lasts."""

    def __init__(self, faults: Faults | None = None, *, port: int = 0, api_key: str | None = None) -> None:
        self.requests: list[Seen] = []
        self.base_url = ""
        """Where it answers, once entered."""
        self._faults = faults or Faults()
        self._api_key = api_key
        self._port = port
        self._attempts: Counter[str] = Counter()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Teacher:
        bound: Future[int] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(bound)), name="pocket-teacher", daemon=True
        )
        self._thread.start()
        self.base_url = f"http://127.0.0.1:{bound.result()}/v1"
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._thread is not None, "entered before"
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    async def _serve(self, bound: Future[int]) -> None:
        self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_get("/v1/models", self._models)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", self._port).start()
            bound.set_result(runner.addresses[0][1])
            await self._closing.wait()
        except OSError as error:
            bound.set_exception(ModelError(f"port {self._port} on 127.0.0.1: {error.strerror}; 0 takes a free one"))
        finally:
            await runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        try:
            self._check_access(request)
        except _Refused as refused:
            return refused.response()
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "anchored"}
        return web.json_response({"object": "list", "data": [model]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        content = content_hash(body.decode("utf-8", "replace"))
        attempt = self._attempts[content]
        self._attempts[content] += 1
        if self._faults.down_after is not None and self._attempts.total() > self._faults.down_after:
            self._note(content, attempt, "none", 0, "down_after")
            return _close(request)
        try:
            self._check_access(request)
            question = _read(body)
        except _Refused as refused:
            self._note(content, attempt, "none", refused.status, refused.code or "")
            return refused.response()
        return await self._answer(request, question, content, attempt)

    async def _answer(
        self, request: web.Request, question: _Question, content: str, attempt: int
    ) -> web.StreamResponse:
        lesson = teach(question.text)
        fault = self._transport_fault(content, attempt)
        if fault == "rate_limited":
            self._note(content, attempt, lesson.part, 429, fault)
            headers = {"Retry-After": f"{self._faults.retry_after:g}"}
            return _Refused(429, "Rate limit reached", "rate_limit_exceeded").response(headers)
        if fault == "server_error":
            self._note(content, attempt, lesson.part, 500, fault)
            return _Refused(500, "The server had an error", None, "server_error").response()
        if fault == "slow":
            await asyncio.sleep(self._faults.slow_seconds)
        said = self._say(lesson, content)
        completion = _completion(question, said, content)
        payload = json.dumps(completion).encode()
        usage = completion["usage"]
        self._note(
            content, attempt, lesson.part, 200, fault or said.fault, usage["prompt_tokens"], usage["completion_tokens"]
        )
        if fault == "cut_body":
            return await _cut(request, payload)
        return web.Response(body=payload, content_type="application/json")

    def _check_access(self, request: web.Request) -> None:
        given = request.headers.get("Authorization", "")
        if self._faults.unauthorized or (self._api_key is not None and given != f"Bearer {self._api_key}"):
            raise _Refused(401, "Incorrect API key provided", "invalid_api_key")
        if self._faults.forbidden:
            raise _Refused(403, "This key may not use this model", "access_denied")
        if self._faults.quota_exhausted:
            raise _Refused(429, "You exceeded your current quota", "insufficient_quota", "insufficient_quota")

    def _transport_fault(self, content: str, attempt: int) -> str:
        if attempt >= self._faults.struck_attempts:
            return ""
        return self._first_struck(("rate_limited", "server_error", "cut_body", "slow"), content)

    def _first_struck(self, names: tuple[str, ...], content: str) -> str:
        """The first of these faults whose share this request falls in; each draws for itself."""
        draws = {name: int(content_hash([name, content])[:12], 16) / 16**12 for name in names}
        return next((name for name in names if draws[name] < getattr(self._faults, name)), "")

    def _say(self, lesson: Lesson, content: str) -> _Said:
        names = ("empty", "refusal", "truncated")
        if lesson.part == "reviser":
            names += ("no_header", "repeated_header", "leak")
        fault = self._first_struck(names, content)
        return _Said(_spoil(lesson, fault), fault)

    def _note(self, content: str, attempt: int, part: Part, status: int, fault: str, *tokens: int) -> None:
        self.requests.append(Seen(content, attempt, part, status, fault, *tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve the pocket teacher on loopback.")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    for name, field in Faults.model_fields.items():
        flag = "--" + name.replace("_", "-")
        if field.annotation is bool:
            parser.add_argument(flag, action="store_true", help=field.description)
        else:
            parser.add_argument(flag, default=field.default, help=field.description)
    options = vars(parser.parse_args())
    port = options.pop("port")
    try:
        faults = Faults(**options)
    except ValidationError as error:
        parser.error("; ".join(f"{problem['loc'][0]}: {problem['msg']}" for problem in error.errors()))
    with Teacher(faults, port=port) as teacher:
        print(f"{MODEL} at {teacher.base_url}; Ctrl-C ends it", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print(f"{len(teacher.requests)} requests")


@dataclass(frozen=True, slots=True)
class _Question:
    text: str
    """The last user turn."""
    prompt: str
    """All turns, for counting."""
    max_tokens: int | None
    choices: int


@dataclass(frozen=True, slots=True)
class _Said:
    text: str
    fault: str


class _Refused(Exception):
    """An error in OpenAI's schema."""

    def __init__(self, status: int, message: str, code: str | None, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.kind = status, message, code, kind

    def response(self, headers: dict[str, str] | None = None) -> web.Response:
        error = {"message": self.message, "type": self.kind, "param": None, "code": self.code}
        return web.json_response({"error": error}, status=self.status, headers=headers)


def _read(body: bytes) -> _Question:
    try:
        fields = json.loads(body)
        model, messages = fields["model"], [(turn["role"], _text(turn["content"])) for turn in fields["messages"]]
        max_tokens = fields.get("max_completion_tokens", fields.get("max_tokens"))
        choices = 1 if fields.get("n") is None else fields["n"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _Refused(400, f"Malformed request: {type(error).__name__} {error}"[:200], None) from error
    if model != MODEL:
        message = f"The model {model!r} does not exist; this server has {MODEL!r}"
        raise _Refused(404, message, "model_not_found")
    if fields.get("stream"):
        raise _Refused(400, "Streaming is not supported; leave out 'stream'", "unsupported_value")
    if max_tokens is not None and not _is_positive(max_tokens):
        raise _Refused(400, f"max_tokens must be a positive integer, got {max_tokens!r}", "invalid_value")
    if not _is_positive(choices) or choices > 128:
        raise _Refused(400, f"n must be an integer from 1 to 128, got {choices!r}", "invalid_value")
    user_turns = [text for role, text in messages if role == "user"]
    if not user_turns:
        raise _Refused(400, "'messages' must hold a user turn", "invalid_value")
    return _Question(user_turns[-1], "\n".join(text for _, text in messages), max_tokens, choices)


def _text(content: Any) -> str:
    """A turn's text, given as such or in parts."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _spoil(lesson: Lesson, fault: str) -> str:
    if fault == "empty":
        return ""
    if fault == "refusal":
        return REFUSAL
    if fault == "no_header":
        return f"{lesson.reasoning}\n\n{lesson.solution}"
    if fault == "repeated_header":
        return f"{lesson.text}\n\n{{corrected_student_solution}}:\n{lesson.solution}"
    if fault == "leak":
        return Lesson(lesson.part, lesson.reasoning, f"In this corrected solution, {lesson.solution}").text
    return lesson.text


def _completion(question: _Question, said: _Said, content: str) -> dict[str, Any]:
    tokens = _tokens(said.text)
    limit = len(tokens) if question.max_tokens is None else question.max_tokens
    if said.fault == "truncated":
        limit = min(limit, len(tokens) // 2)
    finish_reason = "length" if limit < len(tokens) else "stop"
    message = {"role": "assistant", "content": "".join(tokens[:limit])}
    prompt_tokens, completion_tokens = len(_tokens(question.prompt)), question.choices * len(tokens[:limit])
    return {
        "id": f"chatcmpl-{content[:24]}",
        "object": "chat.completion",
        "created": 0,
        "model": MODEL,
        "choices": [
            {"index": index, "message": message, "logprobs": None, "finish_reason": finish_reason}
            for index in range(question.choices)
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def _tokens(text: str) -> list[str]:
    """Words, digits and marks, each with the space before it; together they are the text."""
    return re.findall(r"\s*(?:[^\W\d_]+|\S)|\s+", text)


def _close(request: web.Request) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


async def _cut(request: web.Request, payload: bytes) -> web.StreamResponse:
    headers = {"Content-Type": "application/json", "Content-Length": str(len(payload))}
    response = web.StreamResponse(headers=headers)
    await response.prepare(request)
    await response.write(payload[: len(payload) // 2])
    if request.transport is not None:
        request.transport.close()
    return response


if __name__ == "__main__":
    main()
