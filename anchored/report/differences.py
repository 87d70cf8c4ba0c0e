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
        shared = _sharing(comparison.rows, sheet, store)
        notes += _apart(sheet, comparison.rows, shared, store)
        on = comparison.chosen_on(sheet)
        for rows in shared.values():
            fields += [found for of in ("mean", "chosen") if (found := _field(sheet, of, on, rows, store)) is not None]
    return Differences(tuple(fields), (*_problems(store), *notes))


class _Resamples:
    """The resamples file of one run; what cannot be read is a problem, not the end."""

    def __init__(self, entry: Entry) -> None:
        self.problem = ""
        self.checkpoints: list[str] = []
        self.draws: Mapping[str, str] = {}
        self._path = entry.run.folder / "resamples.npz"
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

    def draw(self, sheet: Sheet) -> str | None:
        return self.draws.get(_key(sheet))

    def scores(self, sheet: Sheet) -> Float[ndarray, "resamples checkpoints"]:
        found = _load(self._path, _key(sheet))
        if found.ndim != 2 or found.shape[1] != len(self.checkpoints) or not np.isfinite(found).all():
            raise DataError(f"{self._path}: {_key(sheet)!r} is not a table of scores")
        return found


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


def _key(sheet: Sheet) -> str:
    return f"{sheet.benchmark}\t{sheet.view}"


def _sharing(rows: Sequence[Row], sheet: Sheet, store: Mapping[Entry, _Resamples]) -> dict[str, list[Row]]:
    """Rows by the draw that all their runs on the sheet share."""
    shared: dict[str, list[Row]] = {}
    for row in rows:
        draws = _draws(row, sheet, store)
        if len(draws) == 1 and (draw := draws.pop()):
            shared.setdefault(draw, []).append(row)
    return shared


def _draws(row: Row, sheet: Sheet, store: Mapping[Entry, _Resamples]) -> set[str | None]:
    return {store[entry].draw(sheet) for entry in row.entries if sheet in entry.sheets}


def _apart(
    sheet: Sheet, rows: Sequence[Row], shared: Mapping[str, Sequence[Row]], store: Mapping[Entry, _Resamples]
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
    mixed = [row.name for row in rows if row not in paired and len(_draws(row, sheet, store) - {None}) > 1]
    if mixed:
        told.append(
            f"{sheet.benchmark}: the runs of {several(mixed)} do not share their resamples, so no paired difference; "
            "give them all the same evaluate.seed and --redo evaluate"
        )
    return told


def _field(
    sheet: Sheet, of: Of, on: str | None, rows: Sequence[Row], store: Mapping[Entry, _Resamples]
) -> Field | None:
    """None where fewer than two rows have what is compared."""
    measured = [(row, found) for row in rows if (found := _measured(row, sheet, of, on, store)) is not None]
    if len(measured) < 2:
        return None
    measured.sort(key=lambda one: -one[1].value)
    values = [found.value for _, found in measured]
    pairs = _pairs(np.array(values), np.stack([found.resampled for _, found in measured], axis=1))
    return Field(
        sheet, of, on if of == "chosen" else None, tuple(row for row, _ in measured), tuple(values), tuple(pairs)
    )


@dataclass(frozen=True, slots=True)
class _Measured:
    value: float
    resampled: Float[ndarray, " resamples"]


def _measured(row: Row, sheet: Sheet, of: Of, on: str | None, store: Mapping[Entry, _Resamples]) -> _Measured | None:
    """The mean over a row's runs of an improvement, with what it is in each resample."""
    each = []
    for entry in row.entries:
        if sheet not in entry.sheets:
            continue
        found = _of_run(entry, sheet, of, on, store[entry])
        if found is None:
            return None
        each.append(found)
    if not each or len({len(found.resampled) for found in each}) > 1:
        return None
    return _Measured(
        float(np.mean([found.value for found in each])), np.mean([found.resampled for found in each], axis=0)
    )


def _of_run(entry: Entry, sheet: Sheet, of: Of, on: str | None, resamples: _Resamples) -> _Measured | None:
    names = resamples.checkpoints
    if START not in names:
        return None
    if of == "mean":
        value, wanted = entry.sheets[sheet].mean.value, [name for name in names if name != START]
    else:
        chosen = chosen_checkpoints(entry, sheet, on)
        # without the questions that both ask, it is of other draws than the whole
        if chosen is None or chosen.left_out:
            return None
        value, wanted = chosen.gain.value, list(chosen.checkpoints)
    if not wanted or not set(wanted) <= set(names):
        return None
    try:
        scores = resamples.scores(sheet)
    except DataError as error:
        resamples.problem = f"{one_line(error)}, so no paired difference; evaluate again"
        return None
    places = [names.index(name) for name in wanted]
    return _Measured(value, scores[:, places].mean(axis=1) - scores[:, names.index(START)])


def _pairs(values: Float[ndarray, " rows"], resampled: Float[ndarray, "resamples rows"]) -> list[Difference]:
    """All pairs of rows that stand from the best to the worst."""
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
