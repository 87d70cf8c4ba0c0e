"""What requests met in batches that gave them no reply: which are not asked again, and what they are told."""

from __future__ import annotations

from typing import NamedTuple

from anchored.errors import NoReply, ReplyError
from anchored.llm.faults import Fault


class _Met(NamedTuple):
    last: Fault
    times: int


class Mishaps:
    """Of one model's requests, by key, since the stage was last complete."""

    def __init__(self, model: str, retries: int | None) -> None:
        self._model = model
        self._retries = retries
        """So often a request that failed is asked again; None: without end."""
        self._met: dict[str, _Met] = {}

    def note(self, key: str, fault: Fault) -> None:
        """A batch gave this request no reply."""
        met = self._met.get(key)
        if fault.follows not in ("quota", "endpoint"):  # no fault of the request
            self._met[key] = _Met(fault, met.times + 1 if met else 1)

    def last(self, key: str) -> Fault | None:
        """What the request met last."""
        met = self._met.get(key)
        return met.last if met else None

    def why_given_up(self, key: str) -> ReplyError | None:
        """Why the request is not asked again: it was refused, or has failed too often."""
        if (met := self._met.get(key)) is None:
            return None
        if met.last.follows == "row":
            return self.refusal(met.last)
        if met.last.follows == "without" or self._retries is None or met.times <= self._retries:
            return None
        return NoReply(f"{self._model} gave no reply in {met.times} batches (last: {met.last.reason})")

    def refusal(self, fault: Fault) -> ReplyError:
        """The request itself is at fault."""
        return ReplyError(f"{self._model} refused the request ({fault.reason})")
