"""Is one row better than another: paired differences between rows, from the resamples that their runs share.

Runs that drew the same questions in each resample are scored on the same draw, so what is hard about a question
cancels. Rows that did not are in different `Field`s: between them there is no paired difference.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from anchored.errors import DataError
from anchored.records import START
from anchored.report.compare import Comparison, Entry, Row, Sheet, chosen_checkpoints, several
from anchored.report.evaluated import Interval
from anchored.runs import one_line

Of = Literal["mean", "chosen"]
"""Whose improvement is compared: the mean over checkpoints, or that of those chosen on another benchmark."""
_META = "meta"


@dataclass(frozen=True, slots=True)
class Difference:
    """By how many points the improvement of row `better` is larger than that of row `worse`, as far as was seen."""

    better: int
    worse: int
    """Places among the field's rows."""
    points: Interval
    """With its own 95 % interval."""
    holds: bool
    """Whether that interval leaves out 0."""
    holds_among_all: bool
    """Whether 0 is left out too by an interval so wide that, in 95 of 100 repetitions, those of all pairs of the field
    hold at once."""


@dataclass(frozen=True, slots=True)
class Field:
    """Rows whose runs share their resamples on one sheet, with the differences of all pairs."""

    sheet: Sheet
    of: Of
    on: str | None
    """The benchmark that checkpoints were chosen on, where `of` is chosen."""
    rows: tuple[Row, ...]
    """The one with the largest improvement first."""
    improvements: tuple[float, ...]
    pairs: tuple[Difference, ...]

    def between(self, one: int, other: int) -> Difference:
        """The difference of two rows, whichever is better."""
        return next(pair for pair in self.pairs if {pair.better, pair.worse} == {one, other})


@dataclass(frozen=True, slots=True)
class Differences:
    """Every field that has something to compare, and which rows are in none."""

    fields: tuple[Field, ...]
    notes: tuple[str, ...]


def differences(comparison: Comparison) -> Differences:
    """Paired differences between the rows of each sheet."""
    store = {entry: _Resamples(entry) for entry in comparison.entries}
    fields, notes = [], []
    for sheet in comparison.sheets:
        for of in ("mean", "chosen"):
            on = comparison.chosen_on(sheet) if of == "chosen" else None
            asked = {
                entry: one
                for entry in comparison.entries
                if sheet in entry.sheets and (one := _asked(entry, sheet, on)) is not None
            }
            if of == "chosen" and on is None:
                continue
            shared = _sharing(comparison.rows, asked, store)
            if of == "mean":
                notes += _apart(sheet, comparison.rows, shared, asked, store)
            for rows in shared.values():
                measured = [_measured(row, asked, store) for row in rows]
                found = _field(sheet, of, on, rows, measured)
                fields += [found] if found else []
    return Differences(tuple(fields), (*_problems(store), *notes))


@dataclass(frozen=True, slots=True)
class _Asked:
    """A run's improvement, and in which resamples it is measured again."""

    improvement: float
    checkpoints: tuple[str, ...]
    """Of which it is the mean."""
    key: str
    """Of the resamples whose questions are those that the improvement is of."""


def _asked(entry: Entry, sheet: Sheet, on: str | None) -> _Asked | None:
    """The mean over checkpoints, or over those chosen `on` a benchmark; None where no resamples are of it."""
    if on is None:
        return _Asked(entry.sheets[sheet].mean.value, entry.evaluated.trained, _key(sheet.benchmark, sheet.view))
    chosen = chosen_checkpoints(entry, sheet, on)
    if chosen and chosen.left_out:
        # the whole view asks more than `chosen` does; another one may ask just what is left
        wanted = (on, sheet.benchmark, chosen.checkpoints, chosen.n, 0)
        chosen = next(
            (
                one
                for one in entry.evaluated.chosen
                if (one.on, one.benchmark, one.checkpoints, one.n, one.left_out) == wanted
            ),
            None,
        )
    return _Asked(chosen.gain.value, chosen.checkpoints, _key(chosen.benchmark, chosen.view)) if chosen else None


class _Resamples:
    """The resamples file of one run; what cannot be read is a problem, not the end."""

    def __init__(self, entry: Entry) -> None:
        self.problem = ""
        self.checkpoints: list[str] = []
        self.draws: Mapping[str, str] = {}
        self._path = entry.run.resamples
        if not self._path.exists():
            self.problem = (
                "no resamples.npz (an older version evaluated it), so no paired difference; evaluate again with "
                "--redo evaluate, which asks nothing twice"
            )
            return
        try:
            meta = json.loads(_load(self._path, _META).tobytes())
            self.checkpoints, self.draws = list(meta["checkpoints"]), dict(meta["draws"])
        except (DataError, ValueError, KeyError, TypeError) as error:
            self.problem = f"resamples.npz cannot be read ({one_line(error)}), so no paired difference; evaluate again"

    def gains(self, asked: _Asked) -> Float[ndarray, " resamples"] | None:
        """The improvement in each resample, NaN where one drew nothing with a grade; None where it cannot be had."""
        try:
            scores = _load(self._path, asked.key)
            places = [self.checkpoints.index(name) for name in asked.checkpoints]
            start = self.checkpoints.index(START)
            return scores[:, places].mean(axis=1, dtype=float) - scores[:, start]
        except (DataError, ValueError, IndexError, TypeError) as error:
            self.problem = (
                f"resamples.npz is not of this run ({one_line(error)}), so no paired difference; evaluate again"
            )
            return None


def _problems(store: Mapping[Entry, _Resamples]) -> list[str]:
    """One line for each problem, with all the runs that have it."""
    names: dict[str, list[str]] = {}
    for entry, found in store.items():
        if found.problem:
            names.setdefault(found.problem, []).append(entry.name)
    return [f"{several(those)}: {problem}" for problem, those in names.items()]


def _load(path: Path, key: str) -> ndarray[Any, Any]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return stored[key]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: {one_line(error)}") from None


def _key(benchmark: str, view: str) -> str:
    return f"{benchmark}\t{view}"


def _sharing(
    rows: Sequence[Row], asked: Mapping[Entry, _Asked], store: Mapping[Entry, _Resamples]
) -> dict[str, list[Row]]:
    """Rows by the draw that all their runs share, as far as they have what is asked."""
    shared: dict[str, list[Row]] = {}
    for row in rows:
        draws = _draws(row, asked, store)
        if len(draws) == 1 and (draw := draws.pop()):
            shared.setdefault(draw, []).append(row)
    return shared


def _draws(row: Row, asked: Mapping[Entry, _Asked], store: Mapping[Entry, _Resamples]) -> set[str | None]:
    return {store[entry].draws.get(asked[entry].key) for entry in row.entries if entry in asked}


def _apart(
    sheet: Sheet,
    rows: Sequence[Row],
    shared: Mapping[str, Sequence[Row]],
    asked: Mapping[Entry, _Asked],
    store: Mapping[Entry, _Resamples],
) -> list[str]:
    """Which rows cannot be compared with which, and why."""
    paired = {row for members in shared.values() for row in members}
    told = []
    if len(shared) > 1:
        groups = "; ".join(several([row.name for row in members]) for members in shared.values())
        told.append(
            f"{sheet.benchmark}: no paired difference between rows of different resamples ({groups}). They are one "
            "where runs answered the same questions, with one evaluate.seed and one evaluate.resamples."
        )
    mixed = [row.name for row in rows if row not in paired and len(_draws(row, asked, store) - {None}) > 1]
    if mixed:
        told.append(
            f"{sheet.benchmark}: the runs of {several(mixed)} do not share their resamples, so no paired difference; "
            "give them all the same evaluate.seed and --redo evaluate"
        )
    return told


@dataclass(frozen=True, slots=True)
class _Measured:
    """The mean over a row's runs of an improvement, with what it is in each resample."""

    value: float
    resampled: Float[ndarray, " resamples"]


def _measured(row: Row, asked: Mapping[Entry, _Asked], store: Mapping[Entry, _Resamples]) -> _Measured | None:
    runs = [entry for entry in row.entries if entry in asked]
    gains = [store[entry].gains(asked[entry]) for entry in runs]
    known = [one for one in gains if one is not None]
    if len(known) < len(runs) or len({len(one) for one in known}) > 1:
        return None
    return _Measured(float(np.mean([asked[entry].improvement for entry in runs])), np.mean(known, axis=0))


def _field(
    sheet: Sheet, of: Of, on: str | None, rows: Sequence[Row], measured: Sequence[_Measured | None]
) -> Field | None:
    """None where fewer than two rows have what is compared."""
    known = [(row, found) for row, found in zip(rows, measured, strict=True) if found]
    if len(known) < 2 or len({len(found.resampled) for _, found in known}) > 1:
        return None
    known.sort(key=lambda one: -one[1].value)
    values = [found.value for _, found in known]
    pairs = _pairs(np.array(values), np.stack([found.resampled for _, found in known], axis=1))
    return Field(sheet, of, on, tuple(row for row, _ in known), tuple(values), tuple(pairs))


def _pairs(values: Float[ndarray, " rows"], resampled: Float[ndarray, "resamples rows"]) -> list[Difference]:
    """All pairs of rows that stand from the best to the worst."""
    resampled = resampled[np.isfinite(resampled).all(axis=1)]
    places = list(combinations(range(len(values)), 2))
    better, worse = np.array(places).T
    gaps = values[better] - values[worse]
    drawn = resampled[:, better] - resampled[:, worse]
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    spread = drawn.std(axis=0)
    # rows that never differ have no spread, and nothing to hold
    off = np.abs(drawn - gaps) / np.where(spread > 0, spread, np.inf)
    reach = np.quantile(off.max(axis=1), 0.95)
    return [
        Difference(
            one,
            other,
            Interval(float(gaps[n]), float(low[n]), float(high[n])),
            holds=bool(low[n] > 0 or high[n] < 0),
            holds_among_all=bool(spread[n] > 0 and gaps[n] > reach * spread[n]),
        )
        for n, (one, other) in enumerate(places)
    ]
