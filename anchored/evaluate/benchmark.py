"""What a benchmark is: items to answer, a rule or a judge that grades the answers, and views of the grades."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from anchored.evaluate.settings import GraderSettings
from anchored.evaluate.statistics import Estimate
from anchored.llm.chat import Chat
from anchored.progress import Progress
from anchored.records import Prompt, content_hash

NO_ANSWER = "without an answer"
CUT = "cut short"
NO_VERDICT = "without a verdict"
SPEAKS_TO_JUDGE = "speaks to the judge"


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
    about: tuple[str, ...] = ()
    """Hashes of what is asked, apart from how (`question_hash`); none: that of the prompt."""

    @property
    def asked(self) -> str:
        """What is asked, word for word."""
        return self.cluster or self.prompt.id

    @property
    def known_by(self) -> frozenset[str]:
        """Two items that have one of these in common, of whichever benchmarks, ask the same, perhaps in other words."""
        about = self.about or (question_hash(*(turn.content for turn in self.prompt.messages)),)
        return frozenset((self.asked, *about))


def question_hash(*texts: str) -> str:
    """Of a question and what else it shows (a context, choices), in whatever order.

    Case and spaces do not count, and neither does a text that stands within another one.
    """
    plain = {as_read(text) for text in texts}
    parts = [text for text in plain if text and not any(text in other for other in plain if other != text)]
    return content_hash(sorted(parts))


def as_read(text: str) -> str:
    """A text without what only its setting makes different."""
    return " ".join(text.split()).casefold()


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
    raw: Any = None
    """More that the benchmark keeps of the judge's reply, for its own files."""
    no_reply: bool = False
    """Whether the judge's endpoint failed at it, which another time it may not."""


@dataclass(frozen=True, slots=True)
class Graded:
    """One item with a model's answer and its grade."""

    item: Item
    answer: str | None
    """None where none could be had, which has no grades either, or where likelihoods are the answer."""
    grade: Grade

    @property
    def grades(self) -> dict[str, float] | None:
        return self.grade.grades

    @property
    def answered(self) -> Answered:
        assert self.answer is not None, "only what was answered is graded"
        return Answered(self.item, self.answer)


Rows = Mapping[str, Graded]
"""What one model did, by the item's id."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What a score is estimated from."""

    items: Sequence[Item]
    """All that were asked, and are drawn from."""
    graded: Sequence[Item]
    """Those that have a grade of every model."""
    models: Sequence[Rows]


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
    estimator: Callable[[Sample, int, int], Estimate] | None = field(default=None, compare=False)
    """For a score that is no mean of grades: the models' scores from a sample, resamples and a seed.

    It draws from all of the sample's items and by the seed alone, so that runs share their draws. Raises
    EvaluationError where there is no such score.
    """
    by_category: bool = True
    """Whether categories have such scores too."""


class Benchmark(Protocol):
    """Questions and their grading."""

    name: str
    version: str
    views: tuple[View, ...]
    """The first is the one that headlines and selection use."""
    judge: GraderSettings | None
    """The model that grades; None: a rule does."""

    def items(self) -> Sequence[Item]:
        """All questions, in a fixed order."""
        ...

    def more_items(self, answers: Sequence[Answered]) -> Sequence[Item]:
        """What else to ask a model that gave these answers. Only estimators make something of it."""
        return ()

    async def grade_all(
        self, answers: Sequence[Answered], judge: Chat | None, on_grade: Callable[[], None]
    ) -> list[Grade]:
        """A grade for each answer, in their order; `on_grade` hears of each.

        Any text is an answer: what cannot be graded has no grades and a note. Raises Stopped where the judge is down.
        """
        ...

    def judged_by(self, judge: Chat | None, rows: Rows) -> str:
        """What distinguishes these grades from those by another judge: model, prompts, sampling. "" for a rule."""
        ...

    def notes(self, rows: Rows) -> Sequence[str]:
        """What to know before one trusts a model's scores."""
        return ()

    def export(self, folder: Path, model: str, rows: Rows) -> None:
        """Write what a model did into the folder in the benchmark's own files, where it has such."""


class GradedByRule(Benchmark, Protocol):
    """A benchmark that needs nobody to grade."""

    judge: GraderSettings | None = None

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

    def judged_by(self, judge: Chat | None, rows: Rows) -> str:
        return ""


@dataclass(frozen=True, slots=True)
class Examinee:
    """A model that a benchmark asks in its own way."""

    name: str
    folder: str | Path | None
    """Its weights; None: it answers at an endpoint."""
    chat: Chat
    likelihoods: Chat | None
    """Tells likelihoods under its weights, to benchmarks that need them (`Likelihoods`)."""


@runtime_checkable
class Examining(Benchmark, Protocol):
    """A benchmark that asks in its own way; its items and views are there when a model was examined."""

    needs_weights: bool
    """Whether it asks for likelihoods, which no endpoint tells."""

    @abstractmethod
    async def examine(self, model: Examinee, progress: Progress) -> list[Graded]:
        """All of its items with the model's answers and their grades."""
        ...

    async def grade_all(
        self, answers: Sequence[Answered], judge: Chat | None, on_grade: Callable[[], None]
    ) -> list[Grade]:
        raise TypeError(f"{self.name} grades where it asks")
