"""A model behind an OpenAI-compatible endpoint: bounded concurrency and rate, retries, money, and clean stops.

Requests go out, `Reply`s come in; what is remembered is not here (`replies`). The `openai` SDK carries the HTTP; its
own retries are off, since they would hide attempts. Once the endpoint proved useless (wrong key, no money, down), every
later call raises the same at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import re
import time
from collections.abc import Awaitable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import quote

from anchored.errors import AnchoredError, BudgetReached, ModelError, NoReply, ReplyError, Stopped
from anchored.llm.chat import Reply, Request
from anchored.llm.faults import Fault, fault_of_exception
from anchored.llm.limits import HeldSlot, Limits, gate_of
from anchored.llm.money import Reserves, Spending, cost, worst_case
from anchored.llm.rates import TokenGuess, read_quotas
from anchored.llm.responses import read_reply
from anchored.llm.settings import EndpointSettings, is_loopback
from anchored.records import content_hash

if TYPE_CHECKING:
    from openai import HttpxBinaryResponseContent

LONGEST_BACKOFF = 60.0
CONNECT_SECONDS = 30.0
FIRST_CONTACT_RETRIES = 3
MOST_THROTTLES = 30
NO_KEY = "none"
SHORTEST_SECRET = 16
"""Shorter keys, such as EMPTY, are words that a reply may hold."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Tries:
    """How often one request has failed so far."""

    failed: int = 0
    throttled: int = 0


class OpenAIChat:
    """Answers from an endpoint (`base_url` overrides the settings': a server that was started for this stage).

    The fingerprint is the model's name alone: the same model at another address, port or proxy is not paid for again.
    What attempts cost by the settings' price is taken out of `purse`; `limits` are a gate of its own unless given.
    """

    def __init__(
        self,
        settings: EndpointSettings,
        *,
        base_url: str | None = None,
        purse: Reserves | None = None,
        limits: Limits | None = None,
    ) -> None:
        import openai

        self.name = settings.model
        self.fingerprint = settings.model
        if settings.extra_body:
            self.fingerprint += f" {content_hash(settings.extra_body)}"
        self.base_url = (base_url or settings.base_url).rstrip("/")
        # whole, for the SDK takes its time to join it
        self._url = f"{self.base_url}/chat/completions"
        self._settings = settings
        self._purse = purse
        self._gate = limits or gate_of(settings)
        self._guess = TokenGuess()
        self._refused: set[str] = set()
        self._said_estimated = False
        self._reached = False
        self._failed_in_a_row = 0
        self._held_back_since: float | None = None
        self._over: tuple[type[AnchoredError], str] | None = None
        self._is_over = asyncio.Event()
        self._client = openai.AsyncOpenAI(
            api_key=self._key(),
            base_url=self.base_url,
            max_retries=0,
            timeout=openai.Timeout(settings.timeout_seconds, connect=min(CONNECT_SECONDS, settings.timeout_seconds)),
            # a proxy of the environment cannot reach a server on this machine
            http_client=openai.DefaultAioHttpClient(trust_env=not is_loopback(self.base_url)),
        )
        # the response itself, for its headers
        self._whole = openai.HttpxBinaryResponseContent
        self._options = openai.RequestOptions()
        if self._client.api_key == NO_KEY:
            self._options["headers"] = {"Authorization": openai.Omit()}

    @property
    def room(self) -> float:
        """How many requests it takes at a time; 0 while it takes none."""
        return self._gate.room

    async def check(self) -> None:
        """A ModelError now, instead of after hours of other work, if nothing answers or the key is refused. Free."""
        tries = _Tries()
        while True:
            call = self._client.get("/models", cast_to=self._whole, options=self._options)
            seen = await self._attempt(call, CONNECT_SECONDS)
            if isinstance(seen, Fault) and seen.status in (401, 403):
                self._end(ModelError, self._why_refused(seen))
            if not isinstance(seen, Fault) or seen.follows != "unreachable":  # not every endpoint lists its models
                self._reached = True
                return
            await asyncio.sleep(self._retry(seen, tries))

    async def reply(self, request: Request) -> Reply:
        tries = _Tries()
        # the slot is kept while waiting to try again: if the endpoint is down, few requests find it out
        characters = sum(len(message.content) for message in request.messages)
        async with self._gate.slot(self._guess.tokens(characters, request.max_tokens)) as slot:
            while True:
                self._raise_if_over()
                body = self._body(request)
                answer = await self._ask(request, body)
                if isinstance(answer, Reply):
                    self._note_success(answer, characters, slot)
                    return answer
                delay = self._delay_after(answer, body, tries, slot)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._is_over.wait(), delay)
                await slot.renew()

    async def close(self) -> None:
        await self._client.close()

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

    def _body(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.name,
            "messages": [{"role": message.role, "content": message.content} for message in request.messages],
            "temperature": request.temperature,
        }
        body["max_completion_tokens" if "max_tokens" in self._refused else "max_tokens"] = request.max_tokens
        if request.top_p != 1:  # some models take either of the two, not both
            body["top_p"] = request.top_p
        if self._settings.send_seed and request.temperature > 0:
            body["seed"] = _seed(request)
        return {name: value for name, value in body.items() if name not in self._refused} | self._settings.extra_body

    async def _ask(self, request: Request, body: dict[str, Any]) -> Reply | Fault:
        """One attempt, its worst case set aside in the purse until it is known what it cost."""
        price = self._settings.price
        if self._purse is None or price is None:
            return await self._send(request, body)
        try:
            async with self._purse.reserved(self.name, worst_case(price, body)) as reservation:
                if self._over:
                    reservation.release()
                    self._raise_if_over()
                answer = await self._send(request, body)
                if isinstance(answer, Reply):
                    spending = cost(price, self.name, body, answer)
                    reservation.settle(spending)
                    self._note_basis(spending)
                elif not answer.may_be_billed:
                    reservation.release()
                return answer
        except BudgetReached as error:
            self._end(BudgetReached, str(error))

    async def _send(self, request: Request, body: dict[str, Any]) -> Reply | Fault:
        started = time.perf_counter()
        call = self._client.post(self._url, cast_to=self._whole, body=body, options=self._options)
        payload = await self._attempt(call, self._settings.timeout_seconds)
        if isinstance(payload, Fault):
            return payload
        answer = read_reply(payload, self.name, request.max_tokens, time.perf_counter() - started)
        return self._redacted(answer) if isinstance(answer, Fault) else answer

    async def _attempt(self, call: Awaitable[HttpxBinaryResponseContent], seconds: float) -> object:
        """The JSON that came back, or the Fault.

        Exceptions end here, so that none with the headers in it is ever raised on.
        """
        import aiohttp
        import openai

        sent = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(seconds):
                response = (await call).response
            self._gate.heard(read_quotas(response.headers), sent)
            return json.loads(self._keyless(response.content))
        except (openai.OpenAIError, aiohttp.ClientError, OSError, ValueError, RecursionError) as error:
            if isinstance(error, openai.APIStatusError):
                self._gate.heard(read_quotas(error.response.headers), sent)
            return self._redacted(fault_of_exception(error))

    def _note_success(self, reply: Reply, characters: int, slot: HeldSlot) -> None:
        self._reached = True
        self._failed_in_a_row = 0
        self._held_back_since = None
        tokens = reply.usage.prompt_tokens + reply.usage.completion_tokens
        if tokens:
            slot.used(tokens)
            self._guess.learn(characters, reply.usage.prompt_tokens, reply.usage.completion_tokens)
        self._gate.replied()

    def _note_basis(self, spending: Spending) -> None:
        if spending.basis == "estimate" and not self._said_estimated:
            self._said_estimated = True
            log.warning("%s sends no usage: what its replies cost is estimated, from above", self._where())

    def _delay_after(self, fault: Fault, body: dict[str, Any], tries: _Tries, slot: HeldSlot) -> float:
        """What a fault means: raises, or gives the seconds until this request is sent again."""
        self._reached |= fault.status is not None
        if fault.follows == "endpoint":
            self._end(ModelError, self._why_refused(fault))
        if fault.follows == "quota":
            way_out = "top up the account, then the same command goes on"
            self._end(Stopped, f"no money is left at {self._where()} ({fault.reason}); {way_out}")
        if fault.follows == "row" or (fault.follows == "without" and fault.parameter not in body):
            raise ReplyError(f"{self._where()} refused the request ({fault.reason})")
        if fault.follows == "without":
            self._leave_out(fault)
            return 0
        if fault.wait is not None and fault.wait > self._settings.patience_seconds:
            wait = f"{fault.wait:.0f} s"
            self._end(Stopped, f"{self._where()} asks to wait {wait} ({fault.reason}); run the same command then")
        if fault.follows == "throttled":
            self._throttle(fault, tries, slot)
            return 0
        return self._retry(fault, tries)

    def _throttle(self, fault: Fault, tries: _Tries, slot: HeldSlot) -> None:
        tries.throttled += 1
        pause = self._pause(fault, _backoff(tries.throttled))
        if tries.throttled > MOST_THROTTLES:
            self._no_reply(f"{self._where()} refused the request {tries.throttled} times ({fault.reason})", fault)
        slot.too_many()
        self._gate.pause(pause)

    def _retry(self, fault: Fault, tries: _Tries) -> float:
        tries.failed += 1
        first_contact = fault.follows == "unreachable" and not self._reached
        most = FIRST_CONTACT_RETRIES if first_contact else fault.most_retries
        if tries.failed > min(self._settings.retries, most):
            self._give_up(fault, tries)
        if fault.wait is None:
            return _backoff(tries.failed)
        self._gate.pause(self._pause(fault, fault.wait))
        return 0

    def _pause(self, fault: Fault, seconds: float) -> float:
        """How long everyone waits after this fault, `seconds` where it does not say; too long in all ends it."""
        if fault.wait is not None:  # all who share the key have heard the same
            seconds = fault.wait + random.uniform(0, min(1.0, fault.wait / 10))
        now = asyncio.get_running_loop().time()
        self._held_back_since = self._held_back_since or now
        if now + seconds - self._held_back_since > self._settings.patience_seconds:
            self._end(
                Stopped,
                f"{self._where()} has answered nothing but {fault.reason} for {now - self._held_back_since:.0f} s and "
                f"wants {seconds:.0f} s more; the same command goes on when it takes requests again",
            )
        return seconds

    def _give_up(self, fault: Fault, tries: _Tries) -> NoReturn:
        if fault.follows == "unreachable" and not self._reached:
            self._end(
                ModelError,
                f"nothing answers at {self.base_url} ({fault.reason}); start the server or correct base_url, "
                f"then `curl {self.base_url}/models` gets an answer",
            )
        if fault.follows == "unreachable":
            self._end(Stopped, f"{self._where()} is down ({fault.reason}); the same command goes on when it is back")
        self._no_reply(f"{self._where()} gave no usable reply in {tries.failed} attempts (last: {fault.reason})", fault)

    def _no_reply(self, message: str, fault: Fault) -> NoReturn:
        """This request got none; many such in a row, and the endpoint is down."""
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= self._settings.stop_after_failures:
            self._end(
                Stopped,
                f"{self._where()} is down: {self._failed_in_a_row} requests in a row got no reply, each in several "
                f"attempts (last: {fault.reason}); the same command goes on when it is back",
            )
        raise NoReply(message)

    def _leave_out(self, fault: Fault) -> None:
        if fault.parameter not in self._refused:
            self._refused.add(fault.parameter)
            instead = "max_completion_tokens is sent instead" if fault.parameter == "max_tokens" else "it is left out"
            log.warning("%s refuses %s (%s): %s", self._where(), fault.parameter, fault.reason, instead)

    def _end(self, error: type[AnchoredError], message: str) -> NoReturn:
        """No later request can succeed: whoever waits is woken and gets the same error."""
        self._over = error, message = self._over or (error, message)
        self._is_over.set()
        self._gate.open_for_good()
        raise error(message)

    def _raise_if_over(self) -> None:
        if self._over:
            error, message = self._over
            raise error(message)

    def _where(self) -> str:
        return f"{self.name} at {self.base_url}"

    def _why_refused(self, fault: Fault) -> str:
        if fault.status in (401, 403):
            variable = self._settings.key_env
            if not variable:
                return f"{self._where()} wants a key ({fault.reason}); name the variable that holds it in key_env"
            way_out = "put one there that may use this model"
            return f"{self._where()} refused the key in {variable} ({fault.reason}); {way_out}"
        return (
            f"{self._where()} takes no requests ({fault.reason}); correct the model's name, "
            "or base_url: it usually ends in /v1"
        )

    def _keyless(self, body: bytes) -> bytes:
        """A response's body without the key, should the endpoint echo it: replies are stored."""
        key = self._client.api_key
        if len(key) < SHORTEST_SECRET:
            return body
        return body.replace(json.dumps(key)[1:-1].encode(), b"[key]")

    def _redacted(self, fault: Fault) -> Fault:
        """Without the key, should the endpoint echo it: whole, quoted, or with its middle starred out."""
        text, key = fault.reason, self._client.api_key
        for form in (key, quote(key, safe="")) if key != NO_KEY else ():
            text = text.replace(form, "[key]")
        return replace(fault, reason=re.sub(r"\S*\*{3,}[^\s.,]*", "[key]", text))


def _backoff(failures: int) -> float:
    """Seconds until the next attempt: exponential, with full jitter to part those that failed together."""
    return random.uniform(0, min(LONGEST_BACKOFF, 2.0 ** (failures - 1)))


def _seed(request: Request) -> int:
    """A seed of 31 bits, another for each prompt and each sample of it."""
    turns = [[message.role, message.content] for message in request.messages]
    return int(content_hash([request.seed, request.index, turns])[:8], 16) & 0x7FFFFFFF
