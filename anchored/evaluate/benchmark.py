"""What a benchmark is: items to answer, views of their grades, and a rule or a judge that grades."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from anchored.llm.chat import Chat
from anchored.records import Prompt


@dataclass(frozen=True, slots=True)
class Item:
    """One question of a benchmark."""

    id: str
    prompt: Prompt
    category: str
    cluster: str = ""
    """Items of one cluster ask the same thing, so a resample draws all of them or none; empty: it stands alone."""
    stratum: str = ""
    """Items of one stratum are averaged together; the whole weighs each stratum by its number of items."""


@dataclass(frozen=True, slots=True)
class View:
    """One way to score the same answers."""

    name: str
    decimals: int | None = None
    """Each stratum's mean grade is rounded to so many decimals before it counts, as some official scores do."""
    left_out: frozenset[str] = frozenset()
    """Items, by id, that do not count."""
    only_in_whole: frozenset[str] = frozenset()
    """Items, by id, that count in the whole and stand in no category."""


@dataclass(frozen=True, slots=True)
class Answered:
    """An item with a checkpoint's answer."""

    item: Item
    text: str


@dataclass(frozen=True, slots=True)
class Grade:
    """What an answer is worth."""

    grades: dict[str, float] | None
    """0..1 by the name of a view; None where no grade could be had."""
    note: str = ""
    """Why there is none, or what was noticed, for people."""
    judgement: str = ""
    """The judge's reply."""
    remarks: tuple[str, ...] = ()
    """Kinds of things noticed, which are counted."""


class Benchmark(Protocol):
    """Questions and their grading."""

    name: str
    version: str
    views: tuple[View, ...]
    """The first is the one that headlines and selection use."""
    needs_judge: bool
    """Whether a model grades."""

    def items(self) -> Sequence[Item]:
        """All questions, in a fixed order."""
        ...

    async def grade_all(
        self, answers: Sequence[Answered], judge: Chat | None, on_grade: Callable[[], None]
    ) -> list[Grade]:
        """A grade for each answer, in their order; `on_grade` hears of each.

        Any text is an answer: what cannot be graded has no grades and a note. Raises Stopped where the judge is down.
        """
        ...

    def judged_by(self, judge: Chat | None) -> str:
        """What distinguishes the grades of one judge from another's: model, prompts, sampling. "" for a rule."""
        ...


class GradedByRule(Benchmark, Protocol):
    """A benchmark that needs nobody to grade."""

    needs_judge: bool = False

    @abstractmethod
    def grade(self, item: Item, answer: str) -> dict[str, float]:
        """The answer's grade, 0..1, in each view. Any text is an answer: grading never raises on it."""
        ...

    async def grade_all(
        self, answers: Sequence[Answered], judge: Chat | None, on_grade: Callable[[], None]
    ) -> list[Grade]:
        grades = []
        for answer in answers:
            grades.append(Grade(self.grade(answer.item, answer.text)))
            on_grade()
        return grades

    def judged_by(self, judge: Chat | None) -> str:
        return ""
