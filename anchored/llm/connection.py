"""An endpoint's address with its key: what is called there ends in a value or in a `Fault`, never in an exception.

The SDK's exceptions hold the request's headers, and so the key; they end here, and what is left of them is redacted.
The SDK's own retries are off, since they would hide attempts.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from anchored.errors import ModelError
from anchored.llm.faults import Fault, fault_of_exception
from anchored.llm.settings import EndpointSettings, is_loopback
from anchored.runs import one_line

if TYPE_CHECKING:
    from openai import HttpxBinaryResponseContent, Omit

CONNECT_SECONDS = 30.0
NO_KEY = "none"
LONGEST_BACKOFF = 60.0
SHORTEST_SECRET = 16
"""Shorter keys, such as EMPTY, are words that a reply may hold."""

Value = TypeVar("Value")


class Connection:
    """A client of one endpoint (`base_url` overrides the settings': a server that was started for this stage)."""

    def __init__(self, settings: EndpointSettings, base_url: str | None = None) -> None:
        import openai

        self.base_url = (base_url or settings.base_url).rstrip("/")
        self.where = f"{settings.model} at {self.base_url}"
        self._settings = settings
        self.client = openai.AsyncOpenAI(
            api_key=self._key(),
            base_url=self.base_url,
            max_retries=0,
            timeout=openai.Timeout(settings.timeout_seconds, connect=min(CONNECT_SECONDS, settings.timeout_seconds)),
            # a proxy of the environment cannot reach a server on this machine
            http_client=openai.DefaultAioHttpClient(trust_env=not is_loopback(self.base_url), verify=_trusted()),
        )
        key = self.client.api_key
        self.secret = json.dumps(key)[1:-1].encode() if len(key) >= SHORTEST_SECRET else b""
        """The key as JSON holds it; empty where it is none that could be told from a word."""
        self.headers: dict[str, str | Omit] = {}
        """Of every request: none of the SDK's own where no key is sent."""
        if key == NO_KEY:
            self.headers["Authorization"] = openai.Omit()

    async def send(self, verb: str, path: str, body: Mapping[str, Any] | None = None) -> HttpxBinaryResponseContent:
        """The response itself, with its headers. Raises the SDK's exceptions: to be called in an `attempt`."""
        import openai

        whole, options = openai.HttpxBinaryResponseContent, openai.RequestOptions(headers=self.headers)
        if verb == "get":
            return await self.client.get(path, cast_to=whole, options=options)
        return await self.client.post(path, cast_to=whole, body=body, options=options)

    async def attempt(
        self,
        call: Awaitable[Value],
        seconds: float | None,
        heard: Callable[[Mapping[str, str]], None] | None = None,
    ) -> Value | Fault:
        """What the call gives, or the Fault behind its exception; `heard` gets the headers of an error response."""
        import aiohttp
        import openai

        try:
            async with asyncio.timeout(seconds):
                return await call
        except (openai.OpenAIError, aiohttp.ClientError, OSError, ValueError, RecursionError) as error:
            if heard and isinstance(error, openai.APIStatusError):
                heard(error.response.headers)
            return self.redacted(fault_of_exception(error))

    def why_refused(self, fault: Fault) -> str:
        """What to tell of an endpoint that takes no requests at all."""
        if fault.status in (401, 403):
            variable = self._settings.key_env
            if not variable:
                return f"{self.where} wants a key ({fault.reason}); name the variable that holds it in key_env"
            way_out = "put one there that may use this model"
            return f"{self.where} refused the key in {variable} ({fault.reason}); {way_out}"
        return (
            f"{self.where} takes no requests ({fault.reason}); correct the model's name, "
            "or base_url: it usually ends in /v1"
        )

    def why_all_refused(self, fault: Fault, times: int) -> str:
        """What to tell of an endpoint that refuses one request like another."""
        return (
            f"{self.where} has answered nothing and refused {times} requests in the same words ({fault.reason}); "
            "correct the model's name or the setting that it speaks of"
        )

    def why_no_money(self, fault: Fault) -> str:
        """What to tell of an account that is empty."""
        return f"no money is left at {self.where} ({fault.reason}); top up the account, then the same command goes on"

    def keyless(self, body: bytes) -> bytes:
        """A response's body without the key, should the endpoint echo it: replies are stored."""
        return body.replace(self.secret, b"[key]") if self.secret else body

    def redacted(self, fault: Fault) -> Fault:
        """Without the key, should the endpoint echo it: whole, quoted, or with its middle starred out."""
        return replace(fault, reason=self.without_key(fault.reason))

    def without_key(self, text: str) -> str:
        """An endpoint's words, as far as they may be shown."""
        key = self.client.api_key
        for form in (key, quote(key, safe="")) if key != NO_KEY else ():
            text = text.replace(form, "[key]")
        return re.sub(r"\S*\*{3,}[^\s.,]*", "[key]", text)

    async def close(self) -> None:
        """Free the connections; idempotent."""
        await self.client.close()

    def _key(self) -> str:
        """The key, checked; NO_KEY where none is sent (the SDK would else take OPENAI_API_KEY by itself)."""
        variable = self._settings.key_env
        key = os.environ.get(variable, "").strip() if variable else ""
        if not key and variable and not is_loopback(self.base_url):
            raise ModelError(
                f"{self.base_url} needs a key and the environment variable {variable} holds none; "
                "set it, or name another in key_env"
            )
        if not (key.isascii() and key.isprintable()):
            raise ModelError(f"the environment variable {variable} holds what cannot be a key; set it again")
        return key or NO_KEY


def _trusted() -> ssl.SSLContext | bool:
    """Whose certificates are believed: those that the environment names, else the usual ones."""
    file, folder = (os.environ.get(name) or None for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"))
    if not (file or folder):
        return True
    try:
        return ssl.create_default_context(cafile=file, capath=folder)
    except OSError as error:
        raise ModelError(f"SSL_CERT_FILE is {file!r}, which holds no certificates ({one_line(error)})") from None


def backoff(failures: int) -> float:
    """Seconds until the next attempt: exponential, with full jitter to part those that failed together."""
    return random.uniform(0, min(LONGEST_BACKOFF, 2.0 ** (failures - 1)))
