"""Rows of a source that cannot be used, as refused pairs, and what people are told about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from anchored.datasets_io import layouts
from anchored.datasets_io.cells import Refused
from anchored.datasets_io.rows import Row
from anchored.records import Answer, Pair, Prompt, content_hash


def refusal(row: Row, reason: Refused) -> Pair:
    """A row that is refused: its outcome, and in the detail where it stands and why."""
    prompt = Prompt((), layouts.own_id(row.columns) or content_hash(row.where)[:16])
    return Pair(prompt, Answer(""), Answer(""), outcome=reason.outcome, detail=f"{row.where}: {reason}")


def describe_refused(source: str | Path, refused: Sequence[Pair], kept: int) -> str:
    """One line for people about the rows of a source that were refused; there must be some."""
    return f"{source}: {len(refused)} of {kept + len(refused)} rows refused {_reasons(refused)}"


def nothing_usable(source: str | Path, thing: str, refused: Sequence[Pair]) -> str:
    """One line for people about a source without a single usable row."""
    if not refused:
        return f"{source}: is empty; it needs at least one {thing}"
    return f"{source}: none of its {len(refused)} rows is a {thing} {_reasons(refused)}"


def _reasons(refused: Sequence[Pair]) -> str:
    counts = Counter(pair.outcome for pair in refused).most_common()
    why = ", ".join(f"{count} {outcome}" for outcome, count in counts)
    return f"({why}); the first: {refused[0].detail}"
