"""From graded answers to scores and improvements, each with its interval: what scores.jsonl and the summary hold.

Models are the starting model, the checkpoints in order and, where there is one, the stronger model, all on the same
items. The improvement of the best checkpoint flatters, whatever its interval; `chosen_elsewhere` does not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from anchored.errors import EvaluationError
from anchored.evaluate import statistics
from anchored.evaluate.benchmark import Benchmark, Item, Rows, Sample, View
from anchored.evaluate.statistics import Estimate


@dataclass(frozen=True, slots=True)
class Resampling:
    """How intervals are drawn."""

    resamples: int
    seed: int


@dataclass(frozen=True, slots=True)
class Part:
    """What one score is of: a benchmark in one view, as a whole or one category of it."""

    view: View
    category: str | None
    items: Sequence[Item]

    def graded(self, models: Sequence[Rows]) -> list[Item]:
        """The items for which every model has a grade."""
        return [item for item in self.items if all(item.id in rows and rows[item.id].grades for rows in models)]

    def estimate(self, models: Sequence[Rows], how: Resampling) -> Estimate | None:
        """The models' scores over what all have a grade for; None where there is nothing."""
        graded = self.graded(models)
        if not graded:
            return None
        if self.view.estimator:
            return self.view.estimator(Sample(self.items, graded, models), how.resamples, how.seed)
        names = {item.id for item in graded}
        design = statistics.design(
            [item.cluster or item.id for item in self.items],
            [item.stratum for item in self.items],
            self.view.decimals,
            [item.id in names for item in self.items],
        )
        table = [[_grade(rows, item, self.view) for item in graded] for rows in models]
        return statistics.estimate(np.array(table), how.resamples, how.seed, design)

    def against_first(self, models: Sequence[Rows], how: Resampling) -> Estimate | None:
        """The first model's score, and every other one's as that with its paired change.

        A change is over the items for which both have a grade, so one model's failures cost the others nothing. None
        where a pair has no such item.
        """
        if self.has_same_grades(models):
            return self.estimate(models, how)
        first, *others = models
        alone = self.estimate([first], how)
        pairs = [self.estimate([first, other], how) for other in others]
        if alone is None or None in pairs:
            return None
        found = [alone, *filter(None, pairs)]
        values = [alone.values[0] + (one.values[-1] - one.values[0]) for one in found]
        resampled = [alone.resampled[:, 0] + (one.resampled[:, -1] - one.resampled[:, 0]) for one in found]
        return Estimate(np.array(values), np.stack(resampled, axis=1), all(one.known for one in found))

    def has_same_grades(self, models: Sequence[Rows]) -> bool:
        """Whether all models have grades for the same items."""
        first, *others = ([item.id for item in self.graded([rows])] for rows in models)
        return all(other == first for other in others)

    def fewest_shared(self, models: Sequence[Rows]) -> int:
        """Of how many items at least each model's change on the first one is."""
        first, *others = models
        return min(len(self.graded([first, other])) for other in others)

    def without(self, asked: frozenset[str]) -> Part:
        """The same without the items that are known by one of these."""
        return replace(self, items=[item for item in self.items if not item.known_by & asked])

    def draws(self, how: Resampling) -> str:
        """A hash of all that shapes the draws: where it is equal, two runs' resamples are of the same items."""
        drawn = [[item.id, item.asked, item.stratum] for item in self.items]
        facts = [drawn, self.view.name, self.view.decimals, how.resamples, how.seed]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def parts(benchmark: Benchmark) -> Iterator[Part]:
    """All that a benchmark has scores for."""
    for view in benchmark.views:
        items = [item for item in benchmark.items() if item.id not in view.left_out]
        yield Part(view, None, items)
        named = [item for item in items if item.id not in view.only_in_whole]
        categories = sorted({item.category for item in named})
        if len(categories) > 1 and view.by_category:
            for category in categories:
                yield Part(view, category, [item for item in named if item.category == category])


@dataclass(frozen=True, slots=True)
class Models:
    """What each model did on one benchmark."""

    trained: tuple[str, ...]
    """The checkpoints, in order."""
    start: Rows
    checkpoints: tuple[Rows, ...]
    stronger: Rows | None = None

    @property
    def own(self) -> list[Rows]:
        """The starting model and the checkpoints."""
        return [self.start, *self.checkpoints]


class Scoring:
    """One benchmark's estimates, each made once."""

    def __init__(self, benchmark: Benchmark, models: Models, how: Resampling) -> None:
        self.benchmark, self.models, self._how = benchmark, models, how
        self.parts = list(parts(benchmark))
        self._together: dict[tuple[str, str | None], Estimate | None] = {}
        self._alike: dict[tuple[str, str | None], bool] = {}
        self.failures: list[str] = []
        """Why there are scores that could not be had."""

    def score(self, part: Part, model: int) -> tuple[statistics.Interval, int] | None:
        """A model's own score, over all it has a grade for, and their number; `model` counts from the start's 0."""
        rows = self.all[model]
        graded = part.graded([rows])
        found, place = None, model
        # where nobody lacks what another has, each one's score is known already
        if model < len(self.models.own) and self._has_same_grades(part):
            found = self.together(part)
        if found is None:
            found, place = self._estimate(part, [rows]), 0
        return (found.interval(place), len(graded)) if found else None

    def together(self, part: Part) -> Estimate | None:
        """The starting model, and all checkpoints by their paired changes on it."""
        key = part.view.name, part.category
        if key not in self._together:
            self._together[key] = self._estimate(part, self.models.own)
            apart = [
                name
                for name, rows in zip(self.models.trained, self.models.checkpoints, strict=True)
                if part.category is None and not part.graded([self.models.start, rows])
            ]
            if apart:
                self.failures.append(
                    f"no {part.view.name} change: of {len(part.items)} items none has a grade of both the starting "
                    f"model and {', '.join(apart)}"
                )
        return self._together[key]

    def _has_same_grades(self, part: Part) -> bool:
        """Whether the starting model and all checkpoints have grades for the same items."""
        key = part.view.name, part.category
        if key not in self._alike:
            self._alike[key] = part.has_same_grades(self.models.own)
        return self._alike[key]

    def improvements(self) -> list[dict[str, Any]]:
        """One row per view and category: max, mean, sd and last over checkpoints (Table 2), and every change.

        `behind_best` has each other checkpoint's paired difference to the best one, which was chosen for its score.

        `n`: the items that the start and a checkpoint both have a grade for; the fewest, where checkpoints differ.
        """
        rows = []
        for part in self.parts if self.models.trained else []:
            found = self.together(part)
            if found is None:
                continue
            gain = found.improvement()
            best = 1 + gain.max_checkpoint
            rows.append(
                {
                    **self._named(part),
                    "n": part.fewest_shared(self.models.own),
                    **asdict(gain),
                    "max_checkpoint": self.models.trained[gain.max_checkpoint],
                    "changes": {
                        name: asdict(found.changes([place])) for place, name in enumerate(self.models.trained, 1)
                    },
                    "behind_best": {
                        name: asdict(found.changes([place], best))
                        for place, name in enumerate(self.models.trained, 1)
                        if place != best
                    },
                }
            )
        return rows

    def best(self, take: int) -> list[int]:
        """The checkpoints (from 1 on) with the highest scores on the whole in the first view; the earliest of equals.

        Empty where there is no such score.
        """
        found = self.together(self.parts[0]) if self.models.trained else None
        if found is None:
            return []
        return sorted(range(1, len(found.values)), key=lambda place: -found.values[place])[:take]

    def chosen_elsewhere(self, on: Scoring, take: int) -> list[dict[str, Any]]:
        """How checkpoints that were chosen on another benchmark improve on this one, without what both of them ask."""
        chosen = on.best(take)
        asked = frozenset[str]().union(*(item.known_by for item in on.benchmark.items()))
        rows = []
        for part in self.parts if chosen else []:
            rest = part.without(asked) if part.category is None else None
            if rest and part.items and not rest.items:
                self.failures.append(
                    f"no {part.view.name} gain of what {on.benchmark.name} chose: all {len(part.items)} items ask what "
                    "it asks as well"
                )
            found = self._estimate(rest, self.models.own) if rest and rest.items else None
            if found is None or rest is None:
                continue
            rows.append(
                {
                    "on": on.benchmark.name,
                    "on_view": on.parts[0].view.name,
                    "checkpoints": [self.models.trained[place - 1] for place in chosen],
                    **self._named(part),
                    "n": rest.fewest_shared([self.models.start, *(self.models.checkpoints[one - 1] for one in chosen)]),
                    "left_out": len(part.items) - len(rest.items),
                    "score": float(found.values[chosen].mean()),
                    "gain": asdict(found.changes(chosen)),
                }
            )
        return rows

    def towards_stronger(self, model: str) -> list[dict[str, Any]]:
        """Which share, in percent, of the distance to the stronger model each checkpoint has come."""
        rows = []
        stronger = self.models.stronger
        for part in self.parts if stronger is not None else []:
            found = self._estimate(part, [*self.models.own, stronger]) if stronger and part.category is None else None
            if found is None:
                continue
            last = len(found.values) - 1
            shares = {name: found.share(place, last) for place, name in enumerate(self.models.trained, 1)}
            rows.append(
                {
                    **self._named(part),
                    "model": model,
                    "gap": asdict(found.changes([last])),
                    "closed": {name: share and asdict(share) for name, share in shares.items()},
                }
            )
        return rows

    def length_changes(self) -> dict[str, Any]:
        """By how many characters each checkpoint's answers are longer than the start's to the same items."""
        changes = {}
        for name, rows in zip(self.models.trained, self.models.checkpoints, strict=True):
            after, before = (_lengths(self.benchmark, model) for model in (rows, self.models.start))
            both = [(after[name], before[name]) for name in after if name in before]
            if both:
                changes[name] = asdict(_mean_change(np.array(both, dtype=float), self._how))
        return changes

    def resamples(self) -> dict[str, tuple[str, Float[ndarray, "resamples models"]]]:
        """By view, the hash of the draws and what the start and each checkpoint score in each of them."""
        found = {}
        for part in self.parts:
            estimate = self.together(part) if part.category is None else None
            if estimate is not None and estimate.known:
                found[part.view.name] = part.draws(self._how), estimate.resampled
        return found

    @cached_property
    def all(self) -> list[Rows]:
        """The starting model, the checkpoints, and the stronger model where there is one."""
        return [*self.models.own, *([self.models.stronger] if self.models.stronger is not None else [])]

    def _named(self, part: Part) -> dict[str, Any]:
        return {"benchmark": self.benchmark.name, "view": part.view.name, "category": part.category}

    def _estimate(self, part: Part, models: Sequence[Rows]) -> Estimate | None:
        try:
            return part.against_first(models, self._how)
        except EvaluationError as error:
            if (failure := f"no {part.view.name} score: {error}") not in self.failures:
                self.failures.append(failure)
            return None


def mean_length(benchmark: Benchmark, rows: Rows) -> float | None:
    """Mean characters per answer of a model; None where it gave none."""
    lengths = _lengths(benchmark, rows)
    return sum(lengths.values()) / len(lengths) if lengths else None


def _lengths(benchmark: Benchmark, rows: Rows) -> dict[str, int]:
    """By the item's id, the characters of what was answered; an empty answer has 0."""
    answered = ((item.id, rows[item.id].answer) for item in benchmark.items() if item.id in rows)
    return {name: len(text) for name, text in answered if text is not None}


def _grade(rows: Rows, item: Item, view: View) -> float:
    grades = rows[item.id].grades
    assert grades is not None, "only graded items are estimated from"
    return grades[view.name]


def _mean_change(lengths: Float[ndarray, "items 2"], how: Resampling) -> statistics.Interval:
    change = lengths[:, 0] - lengths[:, 1]
    n = len(change)
    drawn = statistics.draws(n, how.resamples, how.seed)
    return statistics.interval(float(change.mean()), drawn @ change / n)
