"""Stop strings: what an endpoint is told of them, and where an answer ends by them.

One rule, wherever an answer comes from: it ends before the first stop string that becomes complete as it is written;
of several that the same character completes, before the one that the request names first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from anchored.llm.chat import Reply
from anchored.llm.faults import Fault

MOST_SENT = 4
"""OpenAI takes no more, and many do as it does. What the others end is cut when it is here."""


class Place(NamedTuple):
    """Where a text ends by a stop string."""

    end: int
    """Where the string ends, in characters."""
    number: int
    """Which one of the request's it is."""
    start: int


def first_stop(text: str, stops: Sequence[str]) -> Place | None:
    """Where the first complete stop string is; None if there is none. An empty one stops nothing."""
    found = ((text.find(stop), number, stop) for number, stop in enumerate(stops) if stop)
    return min((Place(at + len(stop), number, at) for at, number, stop in found if at >= 0), default=None)


def sent_stops(stops: Sequence[str]) -> list[str]:
    """Those that an endpoint is told."""
    return [stop for stop in stops if stop][:MOST_SENT]


def cut_at_stop(reply: Reply, stops: Sequence[str]) -> Reply:
    """The reply as one who stops would have written it; `raw` stays whole."""
    place = first_stop(reply.text, stops)
    return replace(reply, text=reply.text[: place.start], finish_reason="stop") if place else reply


def stopped(found: Reply | Fault, stops: Sequence[str], body: Mapping[str, Any]) -> Reply | Fault:
    """What an endpoint sent for a request with this JSON, ended at a stop string.

    A server looks for them in thoughts as well. Where one ended those there is no answer, and `stop` must be left out.
    """
    if isinstance(found, Fault) or not stops:
        return found
    if body.get("stop") and found.reasoning and not found.text and found.finish_reason == "stop":
        return Fault("without", "a stop string ended its thoughts", parameter="stop")
    return cut_at_stop(found, stops)
