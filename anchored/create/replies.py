"""What a reply is worth before anyone looks at what it says: a text, or the outcome that ends its row.

In: a `Reply`, or the `ReplyError` in its place. Out: `Usable` with the text, or `Problem` with outcome and detail.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from anchored.errors import ReplyError
from anchored.llm.chat import Reply
from anchored.records import Outcome


@dataclass(frozen=True, slots=True)
class Usable:
    """A whole reply with something in it."""

    text: str


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a row ends here."""

    outcome: Outcome
    detail: str


def check(result: Reply | ReplyError, who: str) -> Usable | Problem:
    """The reply's text if it is whole; `who` answered, for the detail."""
    if isinstance(result, ReplyError):
        return Problem(Outcome.ENDPOINT_ERROR, f"{who}: {result}")
    if result.finish_reason == "content_filter":
        return Problem(Outcome.REFUSAL, f"{who}: the endpoint's content filter stopped the reply")
    if result.finish_reason != "stop":
        return Problem(Outcome.TRUNCATED, f"{who}: finish_reason is {result.finish_reason!r}, the reply is not whole")
    if not result.text.strip():
        return Problem(Outcome.EMPTY, f"{who}: the reply holds no text")
    return Usable(result.text)


def is_refusal(text: str) -> bool:
    """Whether a text, from its first words on, declines to do what an assistant was asked to."""
    return _REFUSAL.match(text.replace("’", "'").lstrip(" \t\n*_>#")) is not None


_SORRY = (
    r"(?:[^.!?\n]{0,70}\b(?:sorry|apolog\w+|unfortunately|regrettably)\b[^.!?\n]{0,40}?[,.!;:]*\s+(?:but |however,? )?)"
)
_AS_AN_AI = r"(?:as an? [^,.\n]{0,60}\b(?:ai|model|assistant)\b[^,.\n]{0,40}, *)"
_I_CANNOT = (
    r"(?:i|we)\b(?:'m|'re)?(?: \w+){0,3}? ?(?:can't|cannot|can not|couldn't|could not|won't|will not|unable to|not able to"
    r"|not comfortable|uncomfortable|decline|refuse|not (?:willing|allowed|permitted|going) to)\b"
)
# "I can't come to your party" is an answer like any other: only what assistants say counts
_SERVE = (
    r"(?: \w+){0,3}? (?:assist\w*|comply\w*|(?:help|do)(?:ing)?(?: you)?(?: with| in)? (?:that|this|so|it|your request|such)"
    r"|(?:fulfil|accommodat|process|complet|answer|continu|proceed|honor|honour)\w*[^.!?;\n]{0,20}?"
    r" (?:that|this|your|the|these|such) (?:\w+ ){0,2}(?:request|task|prompt|question|conversation|topic|instruction)s?)\b"
)
_PROVIDE = (
    r"(?: \w+){0,3}? (?:provid|giv|offer|shar|creat|generat|writ|produc|discuss|engag|participat|promot|support|condon"
    r"|facilitat|revis|improv|correct|rewrit|edit|help|continu)\w*[^.!?;\n]{0,60}?"
    r" (?:that|this|such|content|material|guidance|instructions?|information|advice|requests?|revisions?|answers?|solutions?"
    r"|harmful|illegal|unethical|inappropriate|offensive|explicit)\b"
)
_REFUSAL = re.compile(
    f"{_SORRY}?{_AS_AN_AI}?{_I_CANNOT}{_SERVE}|(?:{_SORRY}{_AS_AN_AI}?|{_AS_AN_AI}){_I_CANNOT}{_PROVIDE}", re.IGNORECASE
)
