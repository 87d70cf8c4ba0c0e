"""The page's server: this machine's loopback only, and only for who has the address that was printed.

Pages of other sites can reach a loopback port, by its number or under a name of theirs (DNS rebinding). So the Host
must be this machine's, and whatever reads or writes data needs the token of the address, which a browser sends nowhere
by itself: it stands behind the #. The page runs its own script files and nothing else.
"""

from __future__ import annotations

import errno
import hmac
import json
import secrets
import sys
import traceback
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any, cast
from urllib.parse import parse_qsl, urlsplit

from anchored import report
from anchored.errors import AnchoredError, DataError
from anchored.inspect.session import Session
from anchored.runs import one_line

HOST = "127.0.0.1"
TOKEN_HEADER = "X-Anchored-Token"

_HERE, _REPORT = Path(__file__).parent, Path(report.__file__).parent
_FILES = {
    "/": (_HERE / "page.html", "text/html; charset=utf-8"),
    "/page.js": (_HERE / "page.js", "text/javascript; charset=utf-8"),
    "/page.css": (_HERE / "page.css", "text/css; charset=utf-8"),
    "/pair.js": (_REPORT / "pair.js", "text/javascript; charset=utf-8"),
    "/look.css": (_REPORT / "look.css", "text/css; charset=utf-8"),
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_OWN_NAMES = ("127.0.0.1", "localhost")
_MOST_BYTES = 32 * 2**20
"""Of one request: two long answers."""
_IDLE_SECONDS = 120


class Server(ThreadingHTTPServer):
    """Serves one session; `address` is what to open. Raises DataError where the port is taken."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, session: Session, port: int = 0) -> None:
        self.session = session
        self.token = secrets.token_urlsafe(24)
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            reason = "is taken" if taken else f"cannot be used ({one_line(error)})"
            raise DataError(f"port {port} {reason}; choose another --port, or leave it out") from None

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_port}/#{self.token}"

    def server_bind(self) -> None:
        # the base class asks the network for this machine's name, which may take seconds
        TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):  # a browser that went away is no error
            super().handle_error(request, client_address)


class _Refused(Exception):
    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "anchored", ""
    protocol_version = "HTTP/1.1"
    # an answer goes out in two writes, and the second must not wait for the browser
    disable_nagle_algorithm = True
    timeout = _IDLE_SECONDS

    def do_GET(self) -> None:
        self._respond(_READS)

    def do_POST(self) -> None:
        self._respond(_WRITES)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is for what matters."""

    @property
    def _owner(self) -> Server:
        return cast("Server", self.server)

    def _respond(self, table: Mapping[str, Callable[[Session, Mapping[str, Any]], Any]]) -> None:
        url = urlsplit(self.path)
        try:
            self._check_host()
            if table is _READS and url.path in _FILES:
                file, kind = _FILES[url.path]
                self._send(HTTPStatus.OK, file.read_bytes(), kind)
                return
            self._check_token()
            if url.path not in table:
                raise _Refused(HTTPStatus.NOT_FOUND, f"there is no {url.path}")
            asked = self._body() if table is _WRITES else dict(parse_qsl(url.query, keep_blank_values=True))
            self._send_json(HTTPStatus.OK, table[url.path](self._owner.session, asked))
        except _Refused as refusal:
            # what the client still sends of its request is not read
            self.close_connection = True
            self._send_json(refusal.status, {"error": str(refusal)})
        except (AnchoredError, ValueError, TypeError, KeyError, RecursionError) as error:
            known = isinstance(error, AnchoredError)
            message = str(error) if known else f"not a request that this page makes ({one_line(error)})"
            self._send_json(HTTPStatus.BAD_REQUEST, {"error": message})
        except ConnectionError:
            raise
        except Exception as error:
            traceback.print_exc()
            self._send_json(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": f"a fault of anchored: {one_line(error)}"})

    def _check_host(self) -> None:
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or hosts[0].partition(":")[0] not in _OWN_NAMES:
            raise _Refused(HTTPStatus.FORBIDDEN, f"this page is {HOST}'s alone")
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{hosts[0]}":
            raise _Refused(HTTPStatus.FORBIDDEN, "no page but this one may ask here")

    def _check_token(self) -> None:
        sent = self.headers.get(TOKEN_HEADER, "")
        if not hmac.compare_digest(sent.encode("utf-8", "replace"), self._owner.token.encode()):
            raise _Refused(HTTPStatus.FORBIDDEN, "open the address that `anchored inspect` printed, all of it")

    def _body(self) -> Mapping[str, Any]:
        if self.headers.get_content_type() != "application/json":
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "decisions are sent as JSON")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "the request does not say how long it is")
        if int(length) > _MOST_BYTES:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {_MOST_BYTES} bytes")
        found = json.loads(self.rfile.read(int(length)))
        if not isinstance(found, dict):
            raise ValueError("the body is not an object")
        return found

    def _send_json(self, status: HTTPStatus, value: Any) -> None:
        self._send(status, json.dumps(value, allow_nan=False).encode(), "application/json")

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)


def _decide(session: Session, asked: Mapping[str, Any]) -> Any:
    row, kind = asked["row"], asked["decision"]
    texts, note = asked.get("texts", {}), asked.get("note", "")
    kinds = (row, int), (kind, str), (note, str), (texts, dict)
    if not all(isinstance(value, kind) for value, kind in kinds):
        raise TypeError("a decision has row, decision, note and texts")
    if not all(isinstance(text, str) for text in texts.values()):
        raise TypeError("texts are strings")
    return session.decide(row, kind, texts, note)


_READS: Mapping[str, Callable[[Session, Mapping[str, Any]], Any]] = {
    "/api/about": lambda session, asked: session.about(),
    "/api/view": lambda session, asked: session.view(asked),
    "/api/rows": lambda session, asked: session.entries(asked["view"], int(asked["start"]), int(asked["count"])),
    "/api/pair": lambda session, asked: session.pair(int(asked["row"])),
    "/api/texts": lambda session, asked: session.texts(int(asked["row"])),
}
_WRITES: Mapping[str, Callable[[Session, Mapping[str, Any]], Any]] = {"/api/decide": _decide}
