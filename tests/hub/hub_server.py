"""As much of the Hub's API as making a data set and committing files to it needs, on a loopback port.

Large files go through Git LFS, as they do on the Hub for clients without Xet; small ones come within the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

TOKEN = "hf_loopback_token_that_is_good"


@dataclass
class Stored:
    """A repository."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


class Hub:
    """The server; use as a context manager."""

    def __init__(self) -> None:
        self.repositories: dict[str, Stored] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[str] = []
        """Method and path of every request, in their order."""
        self.read_only = False
        hub = self

        class Handler(_Handler):
            def __init__(self, *arguments: Any) -> None:
                self.hub = hub
                super().__init__(*arguments)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    do_PUT = do_POST

    def _answer(self, body: bytes) -> None:
        path = self.path.split("?")[0]
        self.hub.asked.append(f"{self.command} {path}")
        if path.startswith("/blobs/"):  # a signed address: it needs no token
            self.hub.blobs[path.removeprefix("/blobs/")] = body
            return self._send(200, {})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid credentials in Authorization header"})
        for pattern, answer in _ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return self._send(*answer(self.hub, body, *match.groups()))
        return self._send(404, {"error": f"no such route {path}"})

    def _send(self, status: int, answer: Any) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


Answer = tuple[int, Any]


def _whoami(hub: Hub, body: bytes) -> Answer:
    return 200, {"type": "user", "name": "somebody", "orgs": []}


def _info(hub: Hub, body: bytes, name: str) -> Answer:
    if name not in hub.repositories:
        return 404, {"error": "Repository not found"}
    found = hub.repositories[name]
    siblings = [{"rfilename": path} for path in found.files]
    return 200, {"id": name, "private": found.private, "sha": "0" * 40, "siblings": siblings, "tags": []}


def _create(hub: Hub, body: bytes) -> Answer:
    asked = json.loads(body)
    name = f"{asked['organization']}/{asked['name']}"
    if hub.read_only:
        return 403, {"error": "You don't have the rights to create a dataset under this namespace"}
    if name in hub.repositories:
        return 409, {"error": "You already created this dataset repo"}
    assert asked["type"] == "dataset"
    hub.repositories[name] = Stored(private=asked.get("visibility") == "private")
    return 200, {"url": f"{hub.url}/datasets/{name}", "name": name}


def _validate(hub: Hub, body: bytes) -> Answer:
    content = json.loads(body)["content"]
    return (
        (200, {"errors": [], "warnings": []}) if content.startswith("---\n") else (400, {"errors": [{"message": "x"}]})
    )


def _preupload(hub: Hub, body: bytes, name: str) -> Answer:
    files = [file["path"] for file in json.loads(body)["files"]]
    modes = {path: "lfs" if path.endswith(".parquet") else "regular" for path in files}
    return 200, {"files": [{"path": p, "uploadMode": modes[p], "shouldIgnore": False} for p in files]}


def _lfs_batch(hub: Hub, body: bytes, name: str) -> Answer:
    objects = json.loads(body)["objects"]
    upload = [
        {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{hub.url}/blobs/{o['oid']}"}}}
        for o in objects
    ]
    return 200, {"transfer": "basic", "objects": upload}


def _commit(hub: Hub, body: bytes, name: str) -> Answer:
    stored = hub.repositories[name]
    for line in body.splitlines():
        entry = json.loads(line)
        key, value = entry["key"], entry["value"]
        if key == "header":
            stored.commits.append(value["summary"])
        elif key == "file":
            stored.files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            data = hub.blobs[value["oid"]]
            assert hashlib.sha256(data).hexdigest() == value["oid"]
            stored.files[value["path"]] = data
        elif key == "deletedFile":
            del stored.files[value["path"]]
    oid = f"{len(stored.commits):040x}"
    return 200, {"commitUrl": f"{hub.url}/datasets/{name}/commit/{oid}", "commitOid": oid}


_REPOSITORY = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("GET /api/whoami-v2", _whoami),
    (f"GET /api/datasets/{_REPOSITORY}", _info),
    ("POST /api/repos/create", _create),
    ("POST /api/validate-yaml", _validate),
    (f"POST /api/datasets/{_REPOSITORY}/preupload/main", _preupload),
    (f"POST /datasets/{_REPOSITORY}.git/info/lfs/objects/batch", _lfs_batch),
    (f"POST /api/datasets/{_REPOSITORY}/commit/main", _commit),
]
