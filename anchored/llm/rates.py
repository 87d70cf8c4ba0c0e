"""How fast an endpoint may be asked: requests and tokens per minute, as set or as its headers say.

Pure: moments go in (seconds of any one clock), moments come out; nothing waits here (see `limits`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

MINUTE = 60.0
SLACK = 0.5
"""Seconds of rate that may be caught up after a late start, and are held back of each minute for it."""
LONGEST_HOLD = 60.0
"""Where a quota comes back later than this, the endpoint's own answer shall say so."""
CHARACTERS_PER_TOKEN = 4.0
LEARNING = 0.05


@dataclass(frozen=True, slots=True)
class Quota:
    """What an endpoint says of one thing that it counts; None where it does not."""

    limit: float | None
    """Per minute."""
    remaining: float | None
    reset: float | None
    """Seconds until all of it is back."""


class Pace:
    """When the next may be sent, for one thing that is counted per minute: evenly spaced, each in its turn.

    In no minute are there more than `per_minute`, beyond the last request's own amount. What is larger than a whole
    minute's share is sent too, and paid for by the wait after it.
    """

    def __init__(self, per_minute: float | None = None) -> None:
        self.per_minute = per_minute
        """None: without limit, as far as is known."""
        self._is_set = per_minute is not None
        self._paid = float("-inf")
        """The moment at which what was taken so far is paid off."""
        self._newest = float("-inf")
        self._scarce_interval = 0.0
        self._scarce_until = 0.0
        self._held_until = float("-inf")

    def due(self) -> float:
        """The moment from which the next may be sent."""
        return max(self._paid, self._held_until)

    def take(self, amount: float, now: float) -> None:
        """So much is sent now."""
        if self.per_minute is None:
            return
        self._paid = max(self._paid, now - SLACK) + amount * self._interval(now)

    def give_back(self, amount: float) -> None:
        """So much of what was taken was not used; negative: more was."""
        if self.per_minute is not None:
            self._paid -= amount * self._even()

    def heard(self, quota: Quota, sent: float) -> None:
        """What the response to a request that was sent then says: the newest word counts, and what is set more."""
        if self._is_set or sent < self._newest:
            return
        self._newest = sent
        if quota.limit:
            self.per_minute = quota.limit
        if quota.remaining is None or quota.reset is None:
            return
        reset = min(quota.reset, LONGEST_HOLD)
        # what is left is spread over the time until there is more; a quota that comes back bit by bit then settles
        # where half of it is left, and one that comes back at once is used up evenly
        self._scarce_interval = reset / max(quota.remaining, 1)
        self._scarce_until = sent + reset
        self._held_until = self._scarce_until if quota.remaining < 1 else float("-inf")

    def _interval(self, now: float) -> float:
        """Seconds of one unit."""
        return max(self._even(), self._scarce_interval) if now < self._scarce_until else self._even()

    def _even(self) -> float:
        assert self.per_minute is not None
        # a minute's worth, and what may be caught up, are together no more than the limit
        return (MINUTE + SLACK) / self.per_minute


class TokenGuess:
    """How many tokens a request will take, its reply included: by its length and by the replies so far."""

    def __init__(self) -> None:
        self._characters_per_token = CHARACTERS_PER_TOKEN
        self._completion: float | None = None

    def tokens(self, characters: int, max_tokens: int) -> float:
        """The guess for a prompt of so many characters; before the first reply, the longest reply is expected."""
        completion = max_tokens if self._completion is None else min(self._completion, max_tokens)
        return characters / self._characters_per_token + completion

    def learn(self, characters: int, prompt_tokens: int, completion_tokens: int) -> None:
        """What a request took in the end."""
        if self._completion is None:
            self._completion = completion_tokens
        self._completion += LEARNING * (completion_tokens - self._completion)
        if prompt_tokens:
            seen = characters / prompt_tokens
            self._characters_per_token += LEARNING * (max(seen, 0.25) - self._characters_per_token)


@dataclass(frozen=True, slots=True)
class Quotas:
    """What a response's headers say."""

    requests: Quota | None
    tokens: Quota | None


def read_quotas(headers: Mapping[str, str]) -> Quotas:
    """The quotas in `x-ratelimit-limit-requests`, `-remaining-`, `-reset-`, and the same of tokens."""
    found = {name.lower(): text for name, text in headers.items()}
    return Quotas(_quota(found, "requests"), _quota(found, "tokens"))


def read_seconds(text: str) -> float | None:
    """The seconds of `1s`, `6m0s`, `20ms`, `1h2m3.5s` or a bare number; None for anything else."""
    if _NUMBER.fullmatch(text.strip()):
        return float(text)
    if not _DURATION.fullmatch(text.strip()):
        return None
    return sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))


_NUMBER = re.compile(r"\d+(?:\.\d+)?", re.ASCII)
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|us|µs|ns|d|h|m|s)", re.ASCII)
_DURATION = re.compile(rf"(?:{_PART.pattern})+", re.ASCII)
_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


def _quota(headers: Mapping[str, str], what: str) -> Quota | None:
    found = [headers.get(f"x-ratelimit-{part}-{what}") for part in ("limit", "remaining", "reset")]
    if found == [None, None, None]:
        return None
    limit, remaining, reset = (None if text is None else read_seconds(text) for text in found)
    return Quota(limit, remaining, reset)
