"""What went wrong with one attempt at an endpoint, and what follows from it. Pure: no waiting, no sending.

In go the SDK's exceptions or an error's status, headers and body; out comes a `Fault`, whose reason is made of the
status and the body's message alone: the SDK's exceptions hold the request's headers, and so the key.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from anchored.runs import one_line

Follows = Literal[
    "again",  # may succeed if sent again
    "throttled",  # too many at once: everyone waits, then again
    "unreachable",  # nobody answered the connection: again, and if it stays so the endpoint is down
    "without",  # again without `parameter`, which this model refuses
    "row",  # this request will never succeed; others may
    "quota",  # no money left
    "endpoint",  # no request will succeed
]

TIMEOUT_RETRIES = 2
# of gateways that gave up on a model which may have answered
GAVE_UP = {502, 504, 520, 524}

PARAMETERS = ("max_tokens", "temperature", "top_p", "seed", "logprobs", "top_logprobs", "stop")
UNSUPPORTED = re.compile(
    r"unsupported|not supported|n[o']t support|not permitted|not allowed|unrecognized|unknown|unexpected|extra inputs"
    r"|deprecated",
    re.IGNORECASE,
)
# by code or plain words: "quota" alone also stands in messages about a rate per minute
NO_MONEY = re.compile(
    r"insufficient[ _](quota|balance|credit|funds)|credit balance is too low|used all available credits"
    r"|billing_(hard_limit_reached|not_active)",
    re.IGNORECASE,
)
# too many, too long, blank, or of no use to it: whatever is said against them, an answer can be had without
STOPS = re.compile(r"""\bstop_(?:sequences?|strings?)\b|["'`]stop["'`]|^stop\b""", re.IGNORECASE)
MODERATED = re.compile(r"moderation|flagged|content.?(policy|filter)", re.IGNORECASE)
ABOUT_TEXT = re.compile(
    rf"{MODERATED.pattern}|safety|inappropriate|context|token|too (long|large)|length", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Fault:
    """Why one attempt failed."""

    follows: Follows
    reason: str
    status: int | None = None
    wait: float | None = None
    """Seconds that the endpoint asks us to wait."""
    parameter: str = ""
    most_retries: int = sys.maxsize
    """No more than these, even if the settings allow them."""
    not_run: bool = False
    """The endpoint says that it never ran the request."""

    @property
    def minds_the_text(self) -> bool:
        """Whether the endpoint says that it is what one request asks which it does not take."""
        return ABOUT_TEXT.search(self.reason) is not None

    @property
    def may_be_billed(self) -> bool:
        """Whether the model may have done its work all the same: no error of the endpoint's own says otherwise."""
        if self.follows == "without":
            return self.status is None  # a reply came
        return self.follows == "again" and not self.not_run and (self.status is None or self.status in GAVE_UP)


def fault_of_status(status: int, headers: Mapping[str, str], body: Any) -> Fault:
    """The fault of an error response."""
    error = _error_fields(body)
    message = _message(body, error)
    words = f"{error.get('code')} {error.get('type')} {message}"
    reason = f"{status}: {message.removeprefix(f'{status}: ')}" if message else str(status)

    def fault(follows: Follows, **more: Any) -> Fault:
        return Fault(follows, reason, status, retry_after(headers), **more)

    if status == 402 or (status in (400, 403, 429) and NO_MONEY.search(words)):
        return fault("quota")
    if status == 429:
        # one request above the tokens per minute is refused for its rate, at any rate
        return fault("row" if "request too large" in message.lower() else "throttled")
    if status in (408, 409, 425) or status >= 500:
        return fault("again")
    if status == 403 and MODERATED.search(words):
        return fault("row")
    if status in (401, 403, 404, 405) or status < 400:
        return fault("endpoint")
    if status in (400, 422) and (parameter := _refused_parameter(error, message)):
        return fault("without", parameter=parameter)
    return fault("row")


def fault_of_exception(error: Exception) -> Fault:
    """The fault behind an exception of the SDK or of its transport."""
    import aiohttp
    import openai

    if isinstance(error, openai.APIStatusError):
        return fault_of_status(error.status_code, error.response.headers, error.body)
    if isinstance(error, UnicodeEncodeError):
        return Fault("row", "a message holds a lone surrogate, which is no text")
    chain = list(_chain(error))
    for cause in chain:
        if isinstance(cause, aiohttp.ClientConnectorError):
            return Fault("unreachable", one_line(getattr(cause, "os_error", cause)))  # a certificate's has none
        if isinstance(cause, aiohttp.ConnectionTimeoutError):
            return Fault("unreachable", "nobody answered the connection")
    if any(isinstance(cause, TimeoutError) for cause in chain):
        return Fault("again", "no reply in time", most_retries=TIMEOUT_RETRIES)
    if isinstance(error, ValueError | RecursionError):  # brackets within brackets without end
        shown = "" if isinstance(error, json.JSONDecodeError | RecursionError) else f": {one_line(error)}"
        return Fault("again", f"the reply is no JSON{shown}")
    return Fault("again", f"the connection broke ({type(chain[-1]).__name__})")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds to wait that the headers ask for: `retry-after-ms`, or `Retry-After` in seconds or as a date.

    A date is measured by the endpoint's own clock, where it tells it: ours may be wrong, or jump.
    """
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        return max(0.0, seconds) if math.isfinite(seconds) else None
    until = _date(headers.get("retry-after", ""))
    if until is None:
        return None
    now = _date(headers.get("date", "")) or datetime.now(UTC)
    return max(0.0, (until - now).total_seconds())


def _date(text: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return None
    return date.replace(tzinfo=date.tzinfo or UTC)


def _error_fields(body: Any) -> Mapping[str, Any]:
    """The object that describes the error: `{"error": {...}}`, a list of one such, or the body itself."""
    if isinstance(body, list) and body:
        body = body[0]
    if not isinstance(body, Mapping):
        return {}
    error = body.get("error")
    return error if isinstance(error, Mapping) else body


def _message(body: Any, error: Mapping[str, Any]) -> str:
    for message in (error.get("message"), error.get("error"), error.get("detail"), body):
        if message:
            text = message if isinstance(message, str) else json.dumps(message)
            return one_line(text)[:300]
    return ""


def _refused_parameter(error: Mapping[str, Any], message: str) -> str:
    """Which of our parameters the endpoint does not take; "" if the trouble is another."""
    if UNSUPPORTED.search(f"{error.get('code')} {message}"):
        if error.get("param") in PARAMETERS:
            return str(error["param"])
        if named := next((name for name in PARAMETERS if re.search(rf"\b{name}\b", message)), ""):
            return named
    return "stop" if error.get("param") == "stop" or STOPS.search(message) else ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
