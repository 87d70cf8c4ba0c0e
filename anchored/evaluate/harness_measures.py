"""What lm-eval measured, as grades and weights whose weighted mean is lm-eval's own score, to 1e-9.

Most metrics are a mean over questions. Some are a ratio over parts of them (ifeval's instructions), some groups weigh
each task alike: both are weighted means. Whatever is none (F1, BLEU, perplexity), is better when lower, or has grades
beyond 0 to 1 is left out, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anchored.evaluate.harness_tasks import Tasks

_PROBES: tuple[list[float], ...] = ([0.0, 1.0], [1.0, 0.25, 0.0], [0.0, 0.25, 0.25, 1.0, 1.0, 0.0, 1.0])
_CLOSE = 1e-9


@dataclass(frozen=True, slots=True)
class Measure:
    """A metric after a filter."""

    name: str
    """As lm-eval has it, `exact_match,strict-match`; without its `,none` where there is no filter."""
    grades: Mapping[str, float]
    """0..1, by the item's id; items that it does not grade are not there."""
    weights: Mapping[str, float]
    """How much each counts."""

    @property
    def value(self) -> float:
        """The score, 0..1."""
        return weighted_mean([(self.grades[item], self.weights[item]) for item in self.grades])


@dataclass(frozen=True, slots=True)
class Measured:
    """All of one model's."""

    measures: Mapping[str, Measure]
    left_out: Mapping[str, str]
    """Why others are not used, by their name."""


class _LeftOut(Exception):
    """Why a metric is not used."""


def item_id(tasks: Tasks, task: str, place: int) -> str:
    """How a question is called: by its number, and in a group by its task's name too."""
    return f"{task}/{place}" if tasks.group else str(place)


def measured(tasks: Tasks, results: Mapping[str, Any], *, complete: bool) -> Measured:
    """What lm-eval's results hold; where `complete`, each score is compared with lm-eval's own."""
    own = results["results"][tasks.name]
    found: dict[str, Measure] = {}
    left_out: dict[str, str] = {}
    for key in own:
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        name = metric if filtered == "none" else key
        try:
            one = _measure(tasks, results, metric, filtered)
            # NaN is close to nothing
            if complete and not abs(one.value - float(own[key])) <= _CLOSE:
                raise _LeftOut(f"lm-eval makes {float(own[key]):g} of it, and the mean of its grades is {one.value:g}")
        except _LeftOut as reason:
            left_out[name] = str(reason)
        else:
            found[name] = one
    return Measured(found, left_out)


def unusable(tasks: Tasks) -> dict[str, str]:
    """Metrics that cannot be used whatever the answers, and why; all of them where nothing can be."""
    found = {}
    for metric in _metrics(tasks):
        for task in tasks.tasks.values():
            try:
                if metric in task.aggregation():
                    _check_direction(task, metric)
                    _check_kind(task, metric)
            except _LeftOut as reason:
                found[metric] = str(reason)
                break
    return found


def has_a_score(tasks: Tasks) -> bool:
    """Whether there is a metric that can be used."""
    return bool(set(_metrics(tasks)) - set(unusable(tasks)))


def weighted_mean(pairs: Sequence[tuple[float, float]]) -> float:
    """Of grades and their weights, by plain left-to-right sums."""
    return sum(grade * weight for grade, weight in pairs) / sum(weight for _, weight in pairs)


def _metrics(tasks: Tasks) -> list[str]:
    if tasks.group:
        return [one.metric for one in tasks.group.aggregate_metric_list or ()]
    return [metric for task in tasks.tasks.values() for metric in task.aggregation()]


def _measure(tasks: Tasks, results: Mapping[str, Any], metric: str, filtered: str) -> Measure:
    grades: dict[str, float] = {}
    weights: dict[str, float] = {}
    for name, samples in results["samples"].items():
        task = tasks.tasks[name]
        having = [one for one in samples if one["filter"] == filtered and metric in one["metrics"]]
        if not having:
            continue
        _check_direction(task, metric)
        _check_kind(task, metric)
        graded = {item_id(tasks, name, one["doc_id"]): parts for one in having if (parts := _parts(one[metric]))}
        total = sum(map(len, graded.values()))
        weight = _weight(tasks, metric, filtered, results["results"][name]["sample_len"], total)
        for item, parts in graded.items():
            grades[item], weights[item] = sum(parts) / len(parts), weight * len(parts) / total
    if not grades:
        raise _LeftOut("it has no value")
    return Measure(metric if filtered == "none" else f"{metric},{filtered}", grades, weights)


def _weight(tasks: Tasks, metric: str, filtered: str, questions: int, parts: int) -> float:
    """What a task's mean counts."""
    if not tasks.group:
        return parts
    listed = [one for one in tasks.group.aggregate_metric_list or () if one.metric == metric]
    how = next(one for one in listed if not one.filter_list or filtered in one.filter_list)
    return questions if how.weight_by_size else 1.0


def _parts(value: Any) -> list[float]:
    """The grades that a question's value holds: one, or those of its parts; none where it is not to be counted."""
    parts = list(value) if isinstance(value, list | tuple | np.ndarray) else [value]
    if not all(isinstance(part, bool | int | float | np.number | np.bool_) for part in parts):
        raise _LeftOut("its values are no numbers")
    found = [float(part) for part in parts]
    if any(math.isnan(part) for part in found):
        return []
    if outside := [part for part in found if not 0 <= part <= 1]:
        raise _LeftOut(f"its values are not from 0 to 1 (as {outside[0]:g})")
    return found


def _check_direction(task: Any, metric: str) -> None:
    if task.higher_is_better().get(metric) is False:
        raise _LeftOut("lower is better")


def _check_kind(task: Any, metric: str) -> None:
    """Raise for what is no mean, by trying how it aggregates."""
    aggregate = task.aggregation().get(metric)
    if aggregate is None or _is_mean(aggregate, _PROBES) or _is_mean(aggregate, tuple(_nested())):
        return
    raise _LeftOut("it is no mean over questions")


def _nested() -> Iterator[list[list[float]]]:
    """The probes as the parts of questions, each of which has one part more than the one before."""
    for probe in _PROBES:
        yield [probe[: 1 + place] for place in range(len(probe))]


def _is_mean(aggregate: Callable[[Any], Any], probes: Sequence[Sequence[Any]]) -> bool:
    for probe in probes:
        try:
            found = float(aggregate(probe))
        except Exception:  # it takes something else
            return False
        parts = [part for value in probe for part in (value if isinstance(value, list) else [value])]
        if not math.isclose(found, sum(parts) / len(parts), abs_tol=_CLOSE):
            return False
    return True
