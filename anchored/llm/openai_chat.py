"""A model behind an OpenAI-compatible endpoint: bounded concurrency and rate, retries, money, and clean stops.

Requests go out, `Reply`s come in; what is remembered is not here (`replies`). Once the endpoint proved useless (wrong
key, no money, down), every later call raises the same at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from anchored.errors import AnchoredError, BudgetReached, ModelError, NoReply, ReplyError, Stopped
from anchored.llm.bodies import fingerprint, request_body
from anchored.llm.chat import Reply, Request
from anchored.llm.connection import CONNECT_SECONDS, Connection, backoff
from anchored.llm.faults import Fault
from anchored.llm.limits import HeldSlot, Limits, gate_of
from anchored.llm.money import Reserves, Spending, cost, worst_case
from anchored.llm.rates import TokenGuess, read_quotas
from anchored.llm.responses import read_body, read_reply
from anchored.llm.settings import EndpointSettings
from anchored.llm.stops import first_stop, stopped

FIRST_CONTACT_RETRIES = 3
MOST_THROTTLES = 30
LONGEST_TOKEN = 40
"""Characters: some servers end with the token that completes a stop string."""

_INSTEAD = {
    "max_tokens": "max_completion_tokens is sent instead",
    "stop": "it is left out, and answers are cut when they are here",
}

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
        self.name = settings.model
        self.fingerprint = fingerprint(settings)
        self._connection = Connection(settings, base_url)
        self.base_url = self._connection.base_url
        # whole, for the SDK takes its time to join it
        self._url = f"{self.base_url}/chat/completions"
        self._settings = settings
        self._purse = purse
        self._gate = limits or gate_of(settings)
        self._guess = TokenGuess()
        self._refused: set[str] = set()
        self._said_estimated = self._said_unstopped = False
        self._reached = False
        self._answered = False
        self._refusals: Counter[str] = Counter()
        """How often, and in which words, it refused requests before it had answered any."""
        self._failed_in_a_row = 0
        self._held_back_since: float | None = None
        self._over: tuple[type[AnchoredError], str] | None = None
        self._is_over = asyncio.Event()

    @property
    def room(self) -> float:
        """How many requests it takes at a time; 0 while it takes none."""
        return self._gate.room

    async def check(self) -> None:
        """A ModelError now, instead of after hours of other work, if nothing answers or the key is refused. Free."""
        tries = _Tries()
        while True:
            seen = await self._attempt("get", "/models", CONNECT_SECONDS)
            if isinstance(seen, Fault) and seen.status in (401, 403):
                self._end(ModelError, self._connection.why_refused(seen))
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
                body = request_body(self._settings, request, self._refused)
                answer = await self._ask(request, body)
                if isinstance(answer, Reply):
                    self._note_success(answer, characters, slot)
                    return answer
                delay = self._delay_after(answer, body, tries, slot)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._is_over.wait(), delay)
                await slot.renew()

    async def close(self) -> None:
        await self._connection.close()

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
        payload = await self._attempt("post", self._url, self._settings.timeout_seconds, body)
        if isinstance(payload, Fault):
            return payload
        found = read_reply(payload, self.name, request.max_tokens, time.perf_counter() - started)
        self._note_stops(found, body)
        answer = stopped(found, request.stop, body)
        return self._connection.redacted(answer) if isinstance(answer, Fault) else answer

    async def _attempt(self, verb: str, path: str, seconds: float, body: dict[str, Any] | None = None) -> object:
        """The JSON that came back, or the Fault; what the headers say of the quotas is noted."""
        sent = asyncio.get_running_loop().time()

        def heard(headers: Mapping[str, str]) -> None:
            self._gate.heard(read_quotas(headers), sent)

        async def call() -> object:
            response = (await self._connection.send(verb, path, body)).response
            heard(response.headers)
            return read_body(self._connection.keyless(response.content))

        return await self._connection.attempt(call(), seconds, heard)

    def _note_success(self, reply: Reply, characters: int, slot: HeldSlot) -> None:
        self._reached = self._answered = True
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
            log.warning("%s sends no usage: what its replies cost is estimated, from above", self._connection.where)

    def _note_stops(self, found: Reply | Fault, body: Mapping[str, Any]) -> None:
        """Say once that an endpoint writes on where it was told to stop."""
        if self._said_unstopped or isinstance(found, Fault) or not body.get("stop"):
            return
        place = first_stop(found.text, body["stop"])
        if place and len(found.text) - place.end > LONGEST_TOKEN:
            self._said_unstopped = True
            log.warning(
                "%s takes no notice of stop strings: its answers are cut there, and what it writes on counts",
                self._connection.where,
            )

    def _delay_after(self, fault: Fault, body: dict[str, Any], tries: _Tries, slot: HeldSlot) -> float:
        """What a fault means: raises, or gives the seconds until this request is sent again."""
        self._reached |= fault.status is not None
        if fault.follows == "endpoint":
            self._end(ModelError, self._connection.why_refused(fault))
        if fault.follows == "quota":
            self._end(Stopped, self._connection.why_no_money(fault))
        is_ours = fault.parameter in body and fault.parameter not in self._settings.extra_body
        if fault.follows == "row" or (fault.follows == "without" and not is_ours):
            self._note_refusal(fault)
            raise ReplyError(f"{self._connection.where} refused the request ({fault.reason})")
        if fault.follows == "without":
            self._leave_out(fault)
            return 0
        if fault.wait is not None and fault.wait > self._settings.patience_seconds:
            wait = f"{fault.wait:.0f} s"
            self._end(
                Stopped, f"{self._connection.where} asks to wait {wait} ({fault.reason}); run the same command then"
            )
        if fault.follows == "throttled":
            self._throttle(fault, tries, slot)
            return 0
        return self._retry(fault, tries)

    def _note_refusal(self, fault: Fault) -> None:
        """Where nothing was ever answered and all is refused in the same words, it is not these rows that are wrong."""
        if self._answered or fault.minds_the_text:
            return
        self._refusals[fault.reason] += 1
        if self._refusals[fault.reason] >= self._settings.stop_after_failures:
            self._end(ModelError, self._connection.why_all_refused(fault, self._refusals[fault.reason]))

    def _throttle(self, fault: Fault, tries: _Tries, slot: HeldSlot) -> None:
        tries.throttled += 1
        pause = self._pause(fault, backoff(tries.throttled))
        if tries.throttled > MOST_THROTTLES:
            self._no_reply(
                f"{self._connection.where} refused the request {tries.throttled} times ({fault.reason})", fault
            )
        slot.too_many()
        self._gate.pause(pause)

    def _retry(self, fault: Fault, tries: _Tries) -> float:
        tries.failed += 1
        first_contact = fault.follows == "unreachable" and not self._reached
        most = FIRST_CONTACT_RETRIES if first_contact else fault.most_retries
        if tries.failed > min(self._settings.retries, most):
            self._give_up(fault, tries)
        if fault.wait is None:
            return backoff(tries.failed)
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
                f"{self._connection.where} has answered nothing but {fault.reason} for "
                f"{now - self._held_back_since:.0f} s and wants {seconds:.0f} s more; "
                "the same command goes on when it takes requests again",
            )
        return seconds

    def _give_up(self, fault: Fault, tries: _Tries) -> NoReturn:
        if "CERTIFICATE_VERIFY_FAILED" in fault.reason:
            self._end(
                ModelError,
                f"the certificate of {self.base_url} is not trusted ({fault.reason}); name a file with the one that "
                "vouches for it in the environment variable SSL_CERT_FILE",
            )
        if fault.follows == "unreachable" and not self._reached:
            self._end(
                ModelError,
                f"nothing answers at {self.base_url} ({fault.reason}); start the server or correct base_url, "
                f"then `curl {self.base_url}/models` gets an answer",
            )
        if fault.follows == "unreachable":
            self._end(
                Stopped, f"{self._connection.where} is down ({fault.reason}); the same command goes on when it is back"
            )
        self._no_reply(
            f"{self._connection.where} gave no usable reply in {tries.failed} attempts (last: {fault.reason})", fault
        )

    def _no_reply(self, message: str, fault: Fault) -> NoReturn:
        """This request got none; many such in a row, and the endpoint is down."""
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= self._settings.stop_after_failures:
            self._end(
                Stopped,
                f"{self._connection.where} is down: {self._failed_in_a_row} requests in a row got no reply, each in "
                f"several attempts (last: {fault.reason}); the same command goes on when it is back",
            )
        raise NoReply(message)

    def _leave_out(self, fault: Fault) -> None:
        if fault.parameter not in self._refused:
            self._refused.add(fault.parameter)
            instead = _INSTEAD.get(fault.parameter, "it is left out")
            log.warning("%s refuses %s (%s): %s", self._connection.where, fault.parameter, fault.reason, instead)

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
