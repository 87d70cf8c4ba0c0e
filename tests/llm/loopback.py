"""An aiohttp server on loopback in a thread of its own, for a block: what servers of these tests have in common."""

from __future__ import annotations

import asyncio
import ssl
import threading
from typing import Self

from aiohttp import web


class Loopback:
    """Serves what `application` makes; `base_url` is known once the block begins."""

    base_url: str = ""
    tls: ssl.SSLContext | None = None

    def application(self) -> web.Application:
        """What is served, made in the server's thread."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)))
        self._thread.start()
        ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        runner = web.AppRunner(self.application(), access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=self.tls).start()
        host, port = runner.addresses[0]
        self.base_url = f"{'https' if self.tls else 'http'}://{host}:{port}/v1"
        ready.set()
        await self._end.wait()
        await runner.cleanup()
