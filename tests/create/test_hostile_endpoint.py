"""A teacher behind a real endpoint that sends what no teacher should: every row is counted, none harms another."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from commands import POCKET

from anchored import recipe as recipes
from anchored.datasets_io import read_pairs, read_rows
from anchored.pipeline import Plan, execute
from anchored.progress import Silent
from anchored.runs import Run

HEADER = "{teacher_reasoning}: Short.\n\n{corrected_student_solution}:\n"
PAGE = "<!DOCTYPE html><html><body><h1>502 Bad Gateway</h1></body></html>"


def said(content: object, finish_reason: object = "stop", **message: object) -> bytes:
    choice = {
        "index": 0,
        "finish_reason": finish_reason,
        "message": {"role": "assistant", "content": content, **message},
    }
    return json.dumps({"id": "1", "object": "chat.completion", "model": "evil", "choices": [choice]}).encode()


BODIES = {
    "fine": said(f"{HEADER}The answer to fine is known to all."),
    "page for a body": PAGE.encode(),
    "page for a text": said(PAGE),
    "page for a revision": said(HEADER + PAGE),
    "ten megabytes": said(HEADER + "known and " * 1_000_000),
    "ten megabytes of braces": b'{"choices": ' * 800_000,
    "controls": said(HEADER + "The answer to controls is \u0000\u001b[2J\u202eknown."),
    "half a pair": b'{"choices": [{"finish_reason": "stop", "message": {"content": "'
    + json.dumps(HEADER)[1:-1].encode()
    + rb'The answer to half a pair is \ud800 known."}}]}',
    "a number": said(5),
    "nothing": said(None),
    "a list": json.dumps([1, 2]).encode(),
    "cut": said(HEADER + "The answer to cut is", "length"),
    "no reason to end": said(HEADER + "The answer to no reason is known, as said.", None),
    "tool call": said("", "tool_calls", tool_calls=[{"function": {"name": "rm", "arguments": "-rf /"}}]),
}
OUTCOMES = {
    "page for a body": "endpoint_error",
    "page for a text": "no_header",
    "page for a revision": "html",
    "ten megabytes": "too_long",
    "ten megabytes of braces": "endpoint_error",
    "controls": "control_characters",
    "a number": "empty",
    "nothing": "empty",
    "a list": "endpoint_error",
    "cut": "truncated",
    "tool call": "truncated",
}


class Hostile(BaseHTTPRequestHandler):
    """Answers each question with its body."""

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        name = asked.split("{task}: ")[1].split("\\n")[0]
        self._send(BODIES[name])

    def do_GET(self) -> None:
        self._send(b'{"data": []}')

    def log_message(self, *_: object) -> None: ...

    def _send(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def base_url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hostile) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


def test_hostile_replies_are_counted_and_the_others_become_pairs(base_url: str, tmp_path: Path) -> None:
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    rows = [{"id": name, "prompt": name} for name in BODIES]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [{"id": name, "completion": f"The answer to {name[:10]} is known."} for name in BODIES]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    overrides = [
        f"create.prompts={{data: {prompts}, held_out: 0}}",
        f"create.answers.policy={answers}",
        f"create.reviser={{model: evil, base_url: '{base_url}', retries: 0}}",
        "create.filters=[control_characters, html, repetition]",
    ]
    run = execute(Plan(recipes.load(POCKET, overrides), tmp_path / "run", ("create",)), Silent())
    refused = {row.prompt.id: row for row in read_rows(run.refused)}
    assert {name: str(row.outcome) for name, row in refused.items()} == OUTCOMES
    assert {pair.prompt.id for pair in read_pairs(run.pairs).pairs} == set(BODIES) - set(OUTCOMES)
    assert all(len(row.detail) < 500 and "\n" not in row.detail for row in refused.values())
    summary = Run(run.folder).summary("create")
    assert summary is not None
    assert sum(summary["outcomes"].values()) == len(BODIES)
