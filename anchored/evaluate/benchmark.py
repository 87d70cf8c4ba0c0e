"""What a benchmark is: items to answer and a rule that grades an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from anchored.records import Prompt


@dataclass(frozen=True, slots=True)
class Item:
    """One question of a benchmark."""

    id: str
    prompt: Prompt
    category: str


class Benchmark(Protocol):
    """Questions and their grading. A grade is 0..1 per view; a view is one way to score the same answers."""

    name: str
    version: str
    views: tuple[str, ...]
    """The first is the one that headlines and selection use."""

    def items(self) -> Sequence[Item]:
        """All questions, in a fixed order."""
        ...

    def grade(self, item: Item, answer: str) -> dict[str, float]:
        """The answer's grade, 0..1, in each view. Any text is an answer: grading never raises on it."""
        ...
