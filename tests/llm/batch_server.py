"""A real HTTP server on loopback with OpenAI's Batch API: files, batches, and chat completions beside them.

A row's answer depends on its body alone, live or in a batch. What goes wrong is scripted: a `Fate` per batch, in the
order in which they are made; `hiccups` per route, played before it works again.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from fault_server import Act, completion
from loopback import Loopback

Answer = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass
class Fate:
    """What becomes of a batch."""

    status: str = "completed"
    errors: list[dict[str, Any]] = field(default_factory=list)
    """Of validation, where the status is failed."""
    answered: int | None = None
    """So many rows, in order; the others have the code of the status (batch_expired) in the error file."""
    refused: Mapping[int, tuple[int, str]] = field(default_factory=dict)
    """By row: status and message in the error file."""
    missing: frozenset[int] = frozenset()
    """Rows that no file holds."""
    doubled: frozenset[int] = frozenset()
    looks: int = 1
    """At how many looks it is still in progress."""
    late: int = 0
    """At how many looks after that the file of replies is not named yet."""
    short: int = 0
    """So many replies are counted and lack in the file."""
    says: str = ""
    """The status in the server's own words."""


@dataclass
class Made:
    """One batch as the server has it."""

    id: str
    file_id: str
    metadata: dict[str, str]
    rows: list[dict[str, Any]]
    fate: Fate
    looked: int = 0
    cancelled: bool = False


@dataclass
class BatchServer(Loopback):
    answer: Answer = field(default_factory=lambda: lambda body: completion(body["messages"][-1]["content"].upper()))
    fates: list[Fate] = field(default_factory=list)
    hiccups: dict[str, list[Act]] = field(default_factory=dict)
    """By route (`upload`, `file`, `make`, `look`, `list`, `content`, `chat`): played instead of what it does."""
    lost: dict[str, list[Act]] = field(default_factory=dict)
    """By route: played after it did it, in place of its reply."""
    keeps_metadata: bool = True
    batches: list[Made] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    live: list[dict[str, Any]] = field(default_factory=list)
    keys_seen: set[str] = field(default_factory=set)

    @property
    def submitted(self) -> Counter[str]:
        """How often each request was in a batch."""
        return Counter(row["custom_id"] for batch in self.batches for row in batch.rows)

    def application(self) -> web.Application:
        self._names = itertools.count(1)
        app = web.Application(client_max_size=2**30)
        for verb, path, route, act in (
            ("GET", "/models", "models", self._models),
            ("POST", "/chat/completions", "chat", self._chat),
            ("POST", "/files", "upload", self._upload),
            ("GET", "/files/{id}/content", "content", self._content),
            ("GET", "/files/{id}", "file", self._file),
            ("POST", "/batches", "make", self._make),
            ("GET", "/batches", "list", self._list),
            ("GET", "/batches/{id}", "look", self._look),
            ("POST", "/batches/{id}/cancel", "cancel", self._cancel),
        ):
            app.router.add_route(verb, f"/v1{path}", self._route(route, act))
        return app

    def _route(self, name: str, act: Act) -> Act:
        async def handle(request: web.Request) -> web.StreamResponse:
            self.keys_seen.add(request.headers.get("Authorization", ""))
            if self.hiccups.get(name):
                hiccup = self.hiccups[name].pop(0)
                self.calls[name] += 1
                return await hiccup(request)
            response = await act(request)
            self.calls[name] += 1
            return await self.lost[name].pop(0)(request) if self.lost.get(name) else response

        return handle

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": []})

    async def _chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.live.append(body)
        return web.json_response(self.answer(body))

    async def _upload(self, request: web.Request) -> web.Response:
        form = await request.post()
        assert form["purpose"] == "batch"
        upload = form["file"]
        assert isinstance(upload, web.FileField)
        name = f"file-{next(self._names)}"
        self.files[name] = upload.file.read()
        return web.json_response({"id": name, "object": "file", "purpose": "batch", "filename": upload.filename})

    async def _file(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        return web.json_response({"id": name, "object": "file"}, status=200 if name in self.files else 404)

    async def _content(self, request: web.Request) -> web.Response:
        return web.Response(body=self.files[request.match_info["id"]], content_type="application/octet-stream")

    async def _make(self, request: web.Request) -> web.Response:
        asked = await request.json()
        assert (asked["endpoint"], asked["completion_window"]) == ("/v1/chat/completions", "24h")
        rows = [json.loads(line) for line in self.files[asked["input_file_id"]].splitlines()]
        assert all((row["method"], row["url"]) == ("POST", "/v1/chat/completions") for row in rows)
        fate = self.fates.pop(0) if self.fates else Fate()
        metadata = asked["metadata"] if self.keeps_metadata else {}
        made = Made(f"batch_{next(self._names)}", asked["input_file_id"], metadata, rows, fate)
        self.batches.append(made)
        return web.json_response(self._shown(made, "validating"))

    async def _list(self, request: web.Request) -> web.Response:
        newest_first = self.batches[::-1]
        after = request.query.get("after")
        start = next((n for n, made in enumerate(newest_first, 1) if made.id == after), 0)
        page = newest_first[start : start + 2]
        shown = [self._shown(made, "in_progress") for made in page]
        more = start + 2 < len(newest_first)
        last = page[-1].id if page else None
        return web.json_response({"object": "list", "data": shown, "has_more": more, "last_id": last})

    async def _look(self, request: web.Request) -> web.Response:
        made = next((made for made in self.batches if made.id == request.match_info["id"]), None)
        if made is None:
            return web.json_response({"error": {"message": "No such batch"}}, status=404)
        made.looked += 1
        if made.cancelled:
            return web.json_response(self._ended(made, "cancelled"))
        if made.looked <= made.fate.looks:
            return web.json_response(self._shown(made, "in_progress"))
        return web.json_response(self._ended(made, made.fate.status))

    async def _cancel(self, request: web.Request) -> web.Response:
        made = next(made for made in self.batches if made.id == request.match_info["id"])
        made.cancelled = True
        return web.json_response(self._shown(made, "cancelling"))

    def _shown(self, made: Made, status: str, **more: Any) -> dict[str, Any]:
        return {
            "id": made.id,
            "object": "batch",
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
            "created_at": 1,
            "input_file_id": made.file_id,
            "status": status,
            "metadata": made.metadata,
            "request_counts": {"total": len(made.rows), "completed": 0, "failed": 0},
            **more,
        }

    def _ended(self, made: Made, status: str) -> dict[str, Any]:
        fate = made.fate
        more = {"errors": {"object": "list", "data": fate.errors}} if status == "failed" else {}
        if status == "failed" and fate.answered is None:
            return self._shown(made, status, **more)
        output, errors = self._results(made, status)
        counts = {"total": len(made.rows), "completed": len(output), "failed": len(errors)}
        named = {}
        late = 0 < made.looked - fate.looks <= fate.late
        for name, lines in (("output_file_id", [] if late else output[fate.short :]), ("error_file_id", errors)):
            if lines:
                file = f"file-{made.id}-{name}"
                self.files[file] = "".join(json.dumps(line) + "\n" for line in lines).encode()
                named[name] = file
        return self._shown(made, fate.says or status, request_counts=counts, **named, **more)

    def _results(self, made: Made, status: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        fate, output, errors = made.fate, [], []
        for number, row in enumerate(made.rows):
            line = {"id": f"batch_req_{number}", "custom_id": row["custom_id"]}
            if number in fate.missing:
                continue
            if number in fate.refused:
                code, message = fate.refused[number]
                response = {"status_code": code, "request_id": "r", "body": {"error": {"message": message}}}
                errors.append({**line, "response": response, "error": None})
            elif fate.answered is not None and number >= fate.answered:
                error = {"code": f"batch_{status}", "message": f"the batch was {status}"}
                errors.append({**line, "response": None, "error": error})
            else:
                response = {"status_code": 200, "request_id": "r", "body": self.answer(row["body"])}
                output += [{**line, "response": response, "error": None}] * (2 if number in fate.doubled else 1)
        return output[::-1], errors  # in no particular order
