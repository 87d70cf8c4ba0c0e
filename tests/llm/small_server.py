"""A server as an engine would start one, small enough to misbehave as told: `small_server.py --host=H --port=P`.

The environment variable MODE says how: dies, hangs (never healthy), stubborn (ignores SIGTERM), refuses (questions),
taken (once: its port). It starts a process of its own, as engines do. Its answers tell its environment.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MODE = os.environ.get("MODE", "")


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._send(503 if MODE == "hangs" else 200, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if MODE == "refuses":
            self._send(400, {"error": {"message": "the template takes no user turn"}})
            return
        if body["messages"][-1]["content"] == "end":
            os._exit(7)
        told = {"body": body, "environment": dict(os.environ), "key": self.headers.get("Authorization")}
        message = {"role": "assistant", "content": json.dumps(told)}
        self._send(200, {"model": "odd@main", "choices": [{"message": message, "finish_reason": "stop"}]})

    def _send(self, status: int, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


def main() -> None:
    options = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:] if word.startswith("--"))
    if MODE == "dies":
        print("loading the weights\nRuntimeError: no memory for them", flush=True)
        sys.exit(3)
    if MODE == "taken":
        mark = Path(os.environ["MARK"])
        if not mark.exists():
            mark.touch()
            sys.exit("OSError: [Errno 98] Address already in use")
    if MODE == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", *sys.argv[1:]])
    ThreadingHTTPServer((options["host"], int(options["port"])), Answers).serve_forever()


if __name__ == "__main__":
    main()
