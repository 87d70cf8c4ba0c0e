"""What a reply is worth before anyone looks at what it says: a text, or the problem that ends its row.

In: a `Reply`, or the `ReplyError` in its place. Out: `Usable`, or `Problem` with outcome and detail.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from anchored.errors import ReplyError
from anchored.llm.chat import Reply
from anchored.records import Outcome

MOST_CHARACTERS = 1_000_000


@dataclass(frozen=True, slots=True)
class Usable:
    """A whole reply with something in it."""

    text: str
    model: str


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a row ends here."""

    outcome: Outcome
    detail: str
    text: str = ""
    """What there is of an answer, for people who look at refused rows."""


def check(result: Reply | ReplyError, whose: str) -> Usable | Problem:
    """The reply's text if it is whole; `whose` reply it is, for the detail."""
    if isinstance(result, ReplyError):
        return Problem(Outcome.ENDPOINT_ERROR, f"{whose}: {result}")
    if result.finish_reason == "content_filter":
        return Problem(Outcome.REFUSAL, f"{whose}: declined, or stopped by the endpoint's content filter", result.text)
    if result.finish_reason in ("tool_calls", "function_call"):
        return Problem(Outcome.EMPTY, f"{whose}: calls a tool, and is no answer", result.text)
    if result.finish_reason != "stop":
        return Problem(Outcome.TRUNCATED, f"{whose}: not whole, finish_reason is {result.finish_reason!r}", result.text)
    return check_text(result.text, result.model, whose)


def check_text(text: str, model: str, whose: str) -> Usable | Problem:
    """A whole text if there is one, of a length that comparing does not choke on."""
    if not text.strip():
        return Problem(Outcome.EMPTY, f"{whose}: holds no text")
    if len(text) > MOST_CHARACTERS:
        detail = f"{whose}: has {len(text)} characters, more than any answer has"
        return Problem(Outcome.TOO_LONG, detail, text[:MOST_CHARACTERS])
    return Usable(text, model)


def is_refusal(text: str) -> bool:
    """Whether a text, from its first words on, declines to do what an assistant was asked to."""
    return _REFUSAL.match(text.replace("’", "'").lstrip(" \t\n*_>#")) is not None


def beginning(text: str) -> str:
    """The first words of a text, for details."""
    words = " ".join(text.split())
    return repr(words if len(words) <= 100 else f"{words[:100]}…")


_SORRY = (
    r"(?:[^.!?:\n]{0,70}\b(?:sorry|apolog\w+|unfortunately|regrettably)\b[^.!?\n]{0,40}?"
    r"[,.!;:]*\s+(?:but |however,? )?)"
)
_AS_AN_AI = r"(?:as an? [^,.\n]{0,60}\b(?:ai|model|assistant)\b[^,.\n]{0,40}, *)"
_I_CANNOT = (
    r"(?:i|we)\b(?:'m|'re)?(?: \w+){0,3}? ?(?:can't|cannot|can not|couldn't|could not|won't|will not|unable to"
    r"|not able to|not comfortable|uncomfortable|decline|refuse|not (?:willing|allowed|permitted|going) to)\b"
    r"(?: \w+){0,3}? "
)
# "I can't come to your party" is an answer like any other: only what assistants say counts
_SERVE = (
    r"(?:assist\w*|comply\w*|provide (?:information|guidance|instructions|assistance)|(?:help|do)(?:ing)?(?: you)?(?:"
    r" with| in)? (?:that|this|so|it|your request|such)"
    r"|(?:fulfil|accommodat|process|complet|answer|continu|proceed|hono)\w*[^.!?;\n]{0,20}?"
    r" (?:that|this|your|the|these|such) (?:\w+ ){0,2}"
    r"(?:request|task|prompt|question|conversation|topic|instruction)s?"
    r"|(?:generat|produc|creat|writ)\w* (?:that|this|such|any) (?:\w+ of )?(?:content|material))\b"
)
_PROVIDE = (
    r"(?:provid|giv|offer|shar|creat|generat|writ|produc|discuss|engag|participat|promot|support|condon|facilitat|revis"
    r"|improv|correct|rewrit|edit|continu)\w*[^.!?;\n]{0,60}?"
    r" (?:that|this|such|content|material|guidance|instructions?|information|advice|requests?|revisions?|answers?"
    r"|solutions?|lyrics|excerpts|copyrighted|harmful|illegal|unethical|inappropriate|offensive|explicit)\b"
)
_WORK = r"(?:answer|respond|assist|help|provid|revis|writ|generat|creat|engag|discuss|continu)\w*"
_ETHICAL = r"(?:\w+ or )?(?:ethical|appropriate|right|responsible)"
_REFUSAL = re.compile(
    f"{_SORRY}?{_AS_AN_AI}?{_I_CANNOT}{_SERVE}|(?:{_SORRY}{_AS_AN_AI}?|{_AS_AN_AI}){_I_CANNOT}{_PROVIDE}"
    rf"|{_SORRY}?i (?:do not|don't) feel comfortable {_WORK}|{_SORRY}i (?:do not|don't) feel comfortable \w+ing\b"
    rf"|{_SORRY}?i must (?:\w+ )?decline to {_WORK}"
    rf"|{_SORRY}?{_AS_AN_AI}?it (?:is|would) not (?:be )?{_ETHICAL} for me to\b"
    rf"|{_SORRY}?(?:this|that)(?: is|'s) not something (?:that )?i (?:can|am able to|'m able to) {_WORK}",
    re.IGNORECASE,
)
