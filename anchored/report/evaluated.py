"""What the evaluate stage said of a run, checked: improvements, chosen checkpoints, lengths, gaps to stronger models.

In: the stage's summary, a mapping. Out: `Evaluated`. What a summary of an older version lacks is empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from pydantic import FiniteFloat, TypeAdapter, ValidationError

from anchored.errors import DataError
from anchored.records import START, STRONGER


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat


@dataclass(frozen=True, slots=True)
class Gain:
    """How the checkpoints improve on the starting model, on a whole benchmark (category None) or in one category."""

    benchmark: str
    view: str
    category: str | None
    max: Interval
    max_checkpoint: str
    mean: Interval
    sd: FiniteFloat
    """Over checkpoints, ddof 1."""
    last: Interval
    n: int = 0
    changes: Mapping[str, Interval] = field(default_factory=dict)
    """Each checkpoint's own."""
    behind_best: Mapping[str, Interval] = field(default_factory=dict)
    """Each other checkpoint's difference to the best one."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The improvement, on one benchmark, of the checkpoints that were best on another."""

    on: str
    checkpoints: tuple[str, ...]
    """Several: `gain` is their mean."""
    benchmark: str
    view: str
    gain: Interval
    n: int = 0
    left_out: int = 0
    """Questions of `benchmark` that `on` asks too, which are not in `gain`."""
    on_view: str = ""


@dataclass(frozen=True, slots=True)
class Stronger:
    """How far a stronger model is ahead of the starting model, and how much of that each checkpoint has made up."""

    benchmark: str
    view: str
    model: str
    gap: Interval
    """Points."""
    closed: Mapping[str, Interval | None]
    """Percent of the gap, by checkpoint; None where there may as well be no gap."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The summary of an evaluation."""

    checkpoints: tuple[str, ...] = ()
    improvement: tuple[Gain, ...] = ()
    chosen: tuple[Chosen, ...] = ()
    lengths: Mapping[str, Mapping[str, FiniteFloat]] = field(default_factory=dict)
    """Mean characters per answer, by benchmark and checkpoint."""
    length_changes: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)
    """By how many characters answers are longer than the starting model's, by benchmark and checkpoint."""
    stronger: tuple[Stronger, ...] = ()
    notes: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    """What to know before trusting a checkpoint's score, by benchmark and checkpoint."""
    not_scored: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Why a benchmark lacks scores."""

    @property
    def trained(self) -> tuple[str, ...]:
        """The checkpoints of training, in order."""
        return tuple(name for name in self.checkpoints if name not in (START, STRONGER))

    def chosen_for(self, benchmark: str, view: str) -> Chosen | None:
        """The first that says how chosen checkpoints do on a benchmark."""
        return next((one for one in self.chosen if (one.benchmark, one.view) == (benchmark, view)), None)


def read_evaluated(summary: Mapping[str, Any], where: object) -> Evaluated:
    """Check a summary; DataError names what in `where` is not as the stage writes it."""
    try:
        return _shape().validate_python(summary)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{where}: {key} is {first['input']!r:.60}, which no evaluation writes ({first['msg']}); evaluate again"
        ) from None


@cache
def _shape() -> TypeAdapter[Evaluated]:
    return TypeAdapter(Evaluated)
