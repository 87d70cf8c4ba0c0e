"""A served session for the tests of the server and of its page, in this process or as the command."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from commands import ENVIRONMENT, STUCK_SECONDS, command

from anchored.decisions import DecisionFile
from anchored.inspect.rows import load_rows
from anchored.inspect.server import TOKEN_HEADER, Server
from anchored.inspect.session import Session
from anchored.progress import Silent


@dataclass
class Replied:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Served:
    """A server that runs, and how to ask it."""

    server: Server
    decisions: Path

    def send(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Replied:
        """A request with exactly these headers beside those of the protocol."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=60)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        reply = connection.getresponse()
        found = Replied(reply.status, dict(reply.getheaders()), reply.read())
        connection.close()
        return found

    def ask(self, path: str, **query: object) -> Any:
        """What a question of the page gets; it must succeed."""
        reply = self.send("GET", f"{path}?{urlencode(query)}", **{TOKEN_HEADER: self.server.token})
        assert reply.status == 200, reply.body
        return reply.json

    def post(self, body: object, path: str = "/api/decide", **headers: str) -> Replied:
        """A decision as the page sends it; `headers` are further ones, or others."""
        usual = {TOKEN_HEADER: self.server.token, "Content-Type": "application/json"}
        return self.send("POST", path, json.dumps(body).encode(), **usual | headers)

    def lines(self) -> list[dict[str, Any]]:
        """The file of decisions."""
        text = self.decisions.read_text("utf-8") if self.decisions.exists() else ""
        return [json.loads(line) for line in text.splitlines()]


@contextmanager
def served(source: Path, decisions: Path) -> Iterator[Served]:
    """A server of a session of its own."""
    session = Session(source.name, load_rows(str(source), None, Silent()), DecisionFile(decisions))
    with Server(session) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield Served(server, decisions)
        finally:
            server.shutdown()
            thread.join()


@dataclass
class Running:
    """A command that serves, and what it said first."""

    process: subprocess.Popen[str]
    said: list[str]

    def ask(self, path: str, body: object = None) -> object:
        host, token = self.said[1].removeprefix("http://").split("/#")
        connection = http.client.HTTPConnection(host, timeout=60)
        headers = {"X-Anchored-Token": token, "Content-Type": "application/json"}
        connection.request("GET" if body is None else "POST", path, body and json.dumps(body), headers)
        reply = connection.getresponse()
        assert reply.status == 200
        return json.loads(reply.read())

    def end(self, by: int = signal.SIGINT) -> tuple[int, str, str]:
        self.process.send_signal(by)
        out, err = self.process.communicate(timeout=STUCK_SECONDS)
        return self.process.returncode, out, err


@contextmanager
def inspecting(*arguments: object) -> Iterator[Running]:
    """`anchored inspect ARGUMENTS` while it serves."""
    started = command(("inspect", *arguments, "--no-browser"))
    with subprocess.Popen(
        started, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        try:
            yield Running(process, [process.stdout.readline().rstrip() for _ in range(3)])
        finally:
            process.kill()
