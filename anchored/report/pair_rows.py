"""The pairs of a run as data for the page's browser: a sample small enough to open, with the differences marked.

Rows come in, plain JSON values go out. Nothing is escaped here: the page shows every text as text.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from anchored.contrast import word_differences
from anchored.records import Outcome
from anchored.report.contents import Row

MOST_ROWS = 500
_REFUSED_ROWS = 200
"""Room that refused rows have even when accepted ones would fill the page."""
MOST_CHARACTERS = 20_000
"""Of one text; a longer one is cut, and the page says by how much."""
_MOST_CHARACTERS_IN_ALL = 10_000_000
_SEED = 0

_KINDS = {"kept": 0, "removed": 1, "added": 2}


@dataclass(frozen=True, slots=True)
class Sample:
    """The rows that the page holds, in the order of the files, and of how many they are a sample."""

    rows: list[Row]
    of: int


@dataclass(frozen=True, slots=True)
class Choice:
    """Rows that the reader can choose to see."""

    name: str
    label: str
    rows: int


def sample(rows: Sequence[Row]) -> Sample:
    """At most `MOST_ROWS` rows, drawn uniformly within each outcome; every outcome of a refused row is there."""
    shuffled = list(range(len(rows)))
    random.Random(_SEED).shuffle(shuffled)
    kept = [index for index in shuffled if rows[index].pair.outcome is Outcome.OK]
    refused = _in_turns([index for index in shuffled if rows[index].pair.outcome is not Outcome.OK], rows)
    refused = refused[: max(_REFUSED_ROWS, MOST_ROWS - len(kept))]
    kept = kept[: MOST_ROWS - len(refused)]
    # by turns, so that neither kind fills a page of huge texts alone
    by_turns = [index for both in zip_longest(kept, refused) for index in both if index is not None]
    return Sample([rows[index] for index in sorted(_that_fit(by_turns, rows))], len(rows))


def tally(rows: Iterable[Row]) -> Counter[tuple[str, str]]:
    """How many rows of each group end with each outcome."""
    return Counter((row.group, str(row.pair.outcome)) for row in rows)


def choices(counts: Mapping[tuple[str, str], int]) -> list[Choice]:
    """What rows can be narrowed to, given how many there are by group and outcome: a file, or one outcome of refused
    rows."""
    groups: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    for (group, outcome), rows in counts.items():
        groups[group] += rows
        if group == "refused":
            outcomes[outcome] += rows
    found = [
        Choice("all", "all rows", groups.total()),
        Choice("training", "training pairs", groups["training"]),
        Choice("held-out", "held-out pairs", groups["held-out"]),
        Choice("refused", "refused", groups["refused"]),
        *(Choice(outcome, f"refused: {outcome}", n) for outcome, n in outcomes.most_common()),
    ]
    return [choice for choice in found if choice.rows]


def for_page(row: Row) -> dict[str, Any]:
    """One row as the browser wants it; its answers are one list of parts [kind, text], with the kinds of `_KINDS`."""
    pair = row.pair
    rejected, chosen = pair.rejected.text[:MOST_CHARACTERS], pair.chosen.text[:MOST_CHARACTERS]
    return {
        "id": pair.prompt.id,
        "groups": [row.group, str(pair.outcome)],
        "outcome": str(pair.outcome),
        "detail": _cut(pair.detail),
        "method": pair.method,
        "facts": _facts(row),
        "jaccard": row.jaccard,
        "prompt": [[message.role, _cut(message.content)] for message in pair.prompt.messages],
        "parts": parts(rejected, chosen),
        "compared": bool(rejected and chosen),
        "rejected_by": pair.rejected.model,
        "chosen_by": pair.chosen.model,
        "rejected_cut": len(pair.rejected.text) - len(rejected),
        "chosen_cut": len(pair.chosen.text) - len(chosen),
        "rational": _cut(pair.rational),
    }


def _in_turns(indices: Sequence[int], rows: Sequence[Row]) -> list[int]:
    """First one row of each outcome, then the second of each, and so on: rare outcomes come early."""
    seen: Counter[Outcome] = Counter()
    turns = {}
    for index in indices:
        outcome = rows[index].pair.outcome
        turns[index] = seen[outcome]
        seen[outcome] += 1
    return sorted(indices, key=turns.__getitem__)


def _that_fit(indices: Sequence[int], rows: Sequence[Row]) -> list[int]:
    """The first rows whose texts are together not too long for a page; at least one."""
    fitting, characters = [], 0
    for index in indices:
        pair = rows[index].pair
        texts = (pair.chosen.text, pair.rejected.text, pair.rational, *(m.content for m in pair.prompt.messages))
        characters += sum(min(len(text), MOST_CHARACTERS) for text in texts)
        if fitting and characters > _MOST_CHARACTERS_IN_ALL:
            break
        fitting.append(index)
    return fitting


def parts(rejected: str, chosen: str) -> list[list[Any]]:
    """Two texts as the one list of parts [kind, text] that both can be read from."""
    if rejected and chosen:
        return [[_KINDS[span.kind], span.text] for span in word_differences(rejected, chosen)]
    # nothing to compare a lone answer with: it is shown, not marked
    return [[_KINDS["removed"], rejected]] if rejected else [[_KINDS["added"], chosen]] if chosen else []


def _cut(text: str) -> str:
    left = len(text) - MOST_CHARACTERS
    return f"{text[:MOST_CHARACTERS]}… ({left:,} more characters)" if left > 0 else text


def _facts(row: Row) -> list[str]:
    facts = [f"id {row.pair.prompt.id}", row.pair.method, "held out" if row.group == "held-out" else ""]
    if row.jaccard is not None and row.pair.chosen.text and row.pair.rejected.text:
        facts += [
            f"Jaccard {row.jaccard:.1f}",
            f"Levenshtein {row.levenshtein:,.0f}",
            f"length × {row.length_ratio:.2f}",
        ]
    return [fact for fact in facts if fact]
