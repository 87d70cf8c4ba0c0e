"""Rows of a source that were refused: how many, and why, with a first example of each outcome, whatever its size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from anchored.datasets_io import layouts
from anchored.datasets_io.cells import Refused
from anchored.datasets_io.rows import Row
from anchored.errors import DataError
from anchored.records import Answer, Outcome, Pair, Prompt, content_hash


@dataclass(slots=True)
class Refusals:
    """Refused rows, counted one by one."""

    counts: Counter[Outcome] = field(default_factory=Counter)
    examples: dict[Outcome, str] = field(default_factory=dict)
    """The detail of the first row of each outcome, in the order in which they came."""

    @classmethod
    def of(cls, rows: Iterable[Pair]) -> Self:
        """The refusals that some rows are."""
        found = cls()
        for row in rows:
            found.add(row.outcome, row.detail)
        return found

    def add(self, outcome: Outcome, detail: str, rows: int = 1) -> None:
        """Count one more, or as many rows as have the same fate."""
        self.counts[outcome] += rows
        self.examples.setdefault(outcome, detail)

    def told(self, source: str | Path, kept: int) -> str:
        """One line for people; there must be some."""
        refused = self.counts.total()
        return f"{source}: {refused} of {kept + refused} rows refused {self._reasons()}"

    def examples_told(self) -> Iterator[str]:
        """A line for each outcome where there are several, the most frequent first; `told` has the only one's."""
        for outcome, count in self.counts.most_common() if len(self.counts) > 1 else ():
            yield f"{count} {outcome}, the first: {self.examples[outcome]}"

    def nothing_usable(self, source: str | Path, thing: str) -> DataError:
        """What to raise where a source has no `thing` at all."""
        if not self.counts:
            return DataError(f"{source}: is empty; it needs at least one {thing}")
        return DataError(f"{source}: none of its {self.counts.total()} rows is a {thing} {self._reasons()}")

    def _reasons(self) -> str:
        why = ", ".join(f"{count} {outcome}" for outcome, count in self.counts.most_common())
        return f"({why}); the first: {next(iter(self.examples.values()))}"


def refusal(row: Row, reason: Refused) -> Pair:
    """A row that is refused: its outcome, and in the detail where it stands and why."""
    prompt = Prompt((), layouts.own_id(row.columns) or content_hash(row.where)[:16])
    return Pair(prompt, Answer(""), Answer(""), outcome=reason.outcome, detail=f"{row.where}: {reason}")
