"""What is told of a pair that is kept all the same: what its texts hold that people may want to look at.

In: a finished pair, and those of its texts that a judge was shown. Out: what was seen, by its kind.
"""

from __future__ import annotations

from collections.abc import Sequence

from anchored.create.filters import FILTERS, Looks
from anchored.llm.addressed import addresses_judge, holds_verdict
from anchored.records import Pair, as_text

NOTICED = {
    "holds_verdict": "an answer holds [1] or [2], which is not the judge's verdict",
    "addresses_judge": "an answer speaks to its judge",
    "control_characters": "an answer holds control characters (a filter of that name refuses them)",
    "html": "an answer is an HTML page (the filter html refuses it)",
}
"""The kinds, for people."""

_BOTH = Looks(answers="both")


def noticed(pair: Pair, judged: Sequence[str]) -> dict[str, str]:
    """What a pair holds, in words for its `detail`, by its kind."""
    task, found = as_text(pair.prompt), {}
    if words := spoken_to_judge(task, judged):
        found["addresses_judge"] = words
    elif any(map(holds_verdict, judged)):
        found["holds_verdict"] = NOTICED["holds_verdict"]
    for name in ("control_characters", "html"):
        if seen := FILTERS[name].find(pair, _BOTH):
            found[name] = seen
    return found


def spoken_to_judge(task: str, answers: Sequence[str]) -> str:
    """Which words of the answers speak to their judge; "" if none do."""
    words = next(filter(None, (addresses_judge(answer, task) for answer in answers)), "")
    return f"{NOTICED['addresses_judge']}: {words!r}" if words else ""
