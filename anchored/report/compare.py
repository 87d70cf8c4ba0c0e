"""Which of several runs can be compared, and how far: rows by data set and objective, sheets by benchmark and judge.

In: run folders. Out: a `Comparison`: rows of runs that differ in nothing but seeds, sheets of scores that mean the
same, and for each of both a `Result`. A folder that has nothing to compare is named with the way out, and is in no row.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from anchored.errors import AnchoredError, DataError
from anchored.objectives import UNPAIRED
from anchored.records import START, content_hash
from anchored.report.contents import Contents
from anchored.report.evaluated import Chosen, Evaluated, Gain, Interval
from anchored.report.overview import stage_command
from anchored.report.scoreboard import Scoreboard
from anchored.runs import Run

Shaping = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Of a recipe, the settings that change what comes out, by dotted key."""

SEEDS = ("create.prompts.seed", "train.seed", "evaluate.seed")
_ROW_NAMES = {"policy.model", "create.method", "train.objective.name"}
SHOWN_OTHERWISE = {*SEEDS, *_ROW_NAMES}
"""Settings that are told by a row's own columns or by a run's seeds."""
_OF_EVALUATION = ("evaluate.sample.", "evaluate.checkpoints")
"""What of an evaluation's settings makes other scores under the same benchmark, version and judge."""
_OF_BENCHMARKS = {"evaluate.alpaca.ask_again": "alpaca-eval", "evaluate.lm_eval.max_tokens": "lm-eval"}
"""The same, where the benchmark is used or one whose version begins so."""
_SAY_LITTLE = {"data", "name", "model", "prompt", "seed", "temperature", "top_p", "max_tokens", "serve", "held_out"}
_ABSENT = "-"
_MOST_NAMED = 4


@dataclass(frozen=True, slots=True)
class Sheet:
    """Scores that mean the same: one benchmark in one version and view, one judge, the same number of questions."""

    benchmark: str
    version: str
    view: str
    judge: str
    limit: int | None = None
    """Of the recipe, where only so many questions were asked."""


@dataclass(frozen=True, eq=False)
class Entry:
    """One run that can be compared."""

    name: str
    contents: Contents
    evaluated: Evaluated
    settings: Mapping[str, Any]
    """What shapes the run, by dotted key."""

    @property
    def run(self) -> Run:
        return self.contents.run

    @property
    def policy(self) -> str:
        return self.contents.setting("policy.model") or ""

    @property
    def objective(self) -> str:
        return self.contents.setting("train.objective.name") or _ABSENT

    @property
    def seeds(self) -> dict[str, Any]:
        return {key: self.settings.get(key) for key in SEEDS if self._is_used(key)}

    @property
    def train_seconds(self) -> float | None:
        return self.contents.summary("train").get("seconds")

    @cached_property
    def telling(self) -> dict[str, Any]:
        """The settings that make another run of it, seeds aside."""
        return {key: value for key, value in self.settings.items() if key not in SEEDS and self._is_used(key)}

    @cached_property
    def sheets(self) -> dict[Sheet, Gain]:
        """Where it has improvements, in the order of its evaluation."""
        found = {}
        for gain in self.evaluated.improvement:
            board = self.board(gain.benchmark, gain.view)
            if gain.category is None:
                version, judge = (board.version, board.judges) if board else ("", "")
                found[Sheet(gain.benchmark, version, gain.view, judge, self.contents.setting("limit"))] = gain
        return found

    @cached_property
    def gains(self) -> dict[tuple[str, str, str | None], Gain]:
        """By benchmark, view and category."""
        return {(gain.benchmark, gain.view, gain.category): gain for gain in self.evaluated.improvement}

    def board(self, benchmark: str, view: str) -> Scoreboard | None:
        return self._boards.get((benchmark, view))

    @cached_property
    def _boards(self) -> dict[tuple[str, str], Scoreboard]:
        return {(board.benchmark, board.view): board for board in self.contents.boards}

    @cached_property
    def _idle_roles(self) -> tuple[str, ...]:
        """Sections of those whom the method does not ask."""
        method = self.contents.setting("create.method")
        asked = {"clair": "reviser", "stronger-preferred": "stronger"}.get(method, "judge")
        judges = asked == "judge" or self.contents.setting("create.best_of")
        return tuple(
            f"create.{role}."
            for role in ("reviser", "stronger", "judge")
            if role != asked and not (role == "judge" and judges)
        )

    def _is_used(self, key: str) -> bool:
        if key.startswith("create."):
            return not self.contents.setting("train.data") and not key.startswith(self._idle_roles)
        if (of := _OF_BENCHMARKS.get(key)) is not None:
            return any(of == board.benchmark or board.version.startswith(of) for board in self.contents.boards)
        return key in SEEDS or not key.startswith("evaluate.") or key.startswith(_OF_EVALUATION)


@dataclass(frozen=True, eq=False)
class Row:
    """Runs that differ in nothing but seeds."""

    data: str
    objective: str
    settings: str
    """What tells it from the other rows of the same data set and objective; "" where nothing has to."""
    entries: tuple[Entry, ...]

    @property
    def name(self) -> str:
        return " · ".join(filter(None, (self.data, self.objective, self.settings)))

    @property
    def is_unpaired(self) -> bool:
        return self.objective in UNPAIRED

    @property
    def policy(self) -> str:
        return self.entries[0].policy

    @property
    def train_seconds(self) -> float | None:
        return _mean(entry.train_seconds for entry in self.entries)


@dataclass(frozen=True, slots=True)
class Estimate:
    """The mean over a row's runs; its interval's ends are the means of theirs, so it is hardly ever too narrow."""

    value: float
    low: float
    high: float
    between: float | None
    """Standard deviation between runs, ddof 1; None for a single one."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a row came to on a sheet, in percent or points; improvements are on each run's own starting model."""

    runs: int
    """How many of the row's have scores here."""
    n: int
    """Questions; the fewest where runs differ."""
    checkpoints: int
    """The most over which the maximum is taken."""
    max: Estimate
    mean: Estimate
    sd: float
    """Over checkpoints, ddof 1."""
    last: Estimate
    start: Estimate | None
    best: Estimate | None
    """The score of the best checkpoint."""
    best_names: tuple[str, ...]
    """Of each run."""
    chosen: Estimate | None
    """The improvement of the checkpoints that were chosen on another benchmark."""
    chosen_names: tuple[str, ...]
    length: Estimate | None
    """By how many characters answers are longer than the starting model's: those of the chosen checkpoints, else of
    all."""


@dataclass(frozen=True)
class Comparison:
    """Rows and sheets, with what was left out and what to know."""

    rows: tuple[Row, ...]
    sheets: tuple[Sheet, ...]
    left_out: tuple[str, ...] = ()
    """Folders that are in no row, each with the reason and the way out."""
    notes: tuple[str, ...] = ()
    """What differs between the runs and shapes how to read the tables."""
    differing: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Settings in which rows differ: by dotted key, each entry's value by the entry's name."""

    @property
    def entries(self) -> list[Entry]:
        return [entry for row in self.rows for entry in row.entries]

    def result(self, row: Row, sheet: Sheet, category: str | None = None) -> Result | None:
        """None where no run of the row has scores there."""
        found = [entry for entry in row.entries if sheet in entry.sheets]
        gains = [entry.gains.get((sheet.benchmark, sheet.view, category)) for entry in found]
        both = [(entry, gain) for entry, gain in zip(found, gains, strict=True) if gain]
        return _result(both, sheet, category, self.chosen_on(sheet)) if both else None

    def chosen_on(self, sheet: Sheet) -> str | None:
        """The benchmark on which checkpoints were chosen that are reported on this one; the first where runs differ."""
        found = (entry.evaluated.chosen_for(sheet.benchmark, sheet.view) for entry in self.entries)
        return next((chosen.on for chosen in found if chosen), None)

    def categories(self, sheet: Sheet) -> list[str]:
        """By number of questions, most first."""
        sizes: dict[str, int] = {}
        for entry in self.entries:
            for (benchmark, view, category), gain in entry.gains.items() if sheet in entry.sheets else ():
                if (benchmark, view) == (sheet.benchmark, sheet.view) and category is not None:
                    sizes[category] = max(gain.n, sizes.get(category, 0))
        return sorted(sizes, key=lambda name: (-sizes[name], name))


def compare(folders: Sequence[Path], shaping: Shaping, views: Sequence[str] = (), *, each: bool = False) -> Comparison:
    """Read run folders and sort them; `each`: a row for every run.

    `views`: which to show, instead of the first, of the benchmarks that have one of them. Raises DataError where no
    folder has anything to compare, or no benchmark has a view.
    """
    entries, left_out = _gather(folders, shaping)
    if not entries:
        raise DataError("\n".join(left_out) or "no run folders are given")
    rows = _rows(entries, each=each)
    sheets = _shown(entries, views)
    return Comparison(rows, sheets, tuple(left_out), tuple(_notes(rows, sheets)), _differing(entries))


def chosen_checkpoints(entry: Entry, sheet: Sheet, on: str | None) -> Chosen | None:
    """Which of a run's checkpoints were chosen on benchmark `on`, with what they gain on the sheet."""
    wanted = (on, sheet.benchmark, sheet.view)
    return next((one for one in entry.evaluated.chosen if (one.on, one.benchmark, one.view) == wanted), None)


def short(value: Any) -> str:
    """A setting's value, for a label."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return f"[{', '.join(map(short, value))}]"
    return "null" if value is None else str(value)


def several(names: Sequence[str]) -> str:
    """Names for a sentence; of many the first ones and how many more."""
    if len(names) <= _MOST_NAMED:
        return ", ".join(names)
    return f"{', '.join(names[: _MOST_NAMED - 1])} and {len(names) - _MOST_NAMED + 1} others"


def _gather(folders: Sequence[Path], shaping: Shaping) -> tuple[list[Entry], list[str]]:
    entries: list[Entry] = []
    left_out = []
    seen: dict[Path, Path] = {}
    copies: dict[str, Entry] = {}
    for folder in folders:
        place = folder.resolve()
        if place in seen:
            left_out.append(f"{folder}: the same run as {seen[place]}, counted once")
            continue
        seen[place] = folder
        try:
            entry = _entry(folder, shaping)
            scores = hashlib.sha256(entry.run.scores.read_bytes()).hexdigest()
            same = copies.setdefault(content_hash([entry.settings, scores]), entry)
        except (AnchoredError, OSError) as error:
            left_out.append(str(error))
            continue
        if same is not entry:
            left_out.append(
                f"{folder}: a copy of {same.run.folder} (the same settings, seeds and scores), counted once; another "
                "train.seed makes another run"
            )
            continue
        entries.append(entry)
    return _named(entries), left_out


def _entry(folder: Path, shaping: Shaping) -> Entry:
    run = Run(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder" if not folder.exists() else f"{folder}: a file, not a run folder")
    contents = Contents(run)
    if not contents.recipe:
        inside = [child for child in folder.iterdir() if Run(child).recipe.is_file()]
        way_out = f"give the run folders in it: {folder}/*" if inside else "give folders that `anchored run` made"
        raise DataError(f"{folder}: not a run folder, for it has no recipe.yaml; {way_out}")
    if not run.scores.exists():
        raise DataError(f"{folder}: has no scores yet; `{stage_command(run, 'evaluate')}` makes them")
    if not contents.summary("evaluate"):
        raise DataError(
            f"{folder}: its evaluation has not come to its end; `{stage_command(run, 'evaluate')}` goes on with it"
        )
    evaluated = contents.evaluated
    if not any(gain.category is None for gain in evaluated.improvement):
        raise DataError(
            f"{folder}: only its starting model is scored, so there is no improvement to compare; train it "
            f"(`{stage_command(run, 'train')}`), then evaluate again"
        )
    entry = Entry(str(folder), contents, evaluated, shaping(contents.recipe))
    # its files are read before it is counted on
    _ = entry.sheets, entry.train_seconds
    return entry


def _named(entries: Sequence[Entry]) -> list[Entry]:
    """Each under the shortest end of its path that no other has."""
    parts = {entry: entry.run.folder.resolve().parts for entry in entries}

    def name(entry: Entry) -> str:
        mine = parts[entry]
        lengths = range(1, len(mine) + 1)
        others = [other for one, other in parts.items() if one is not entry]
        length = next((n for n in lengths if all(other[-n:] != mine[-n:] for other in others)), len(mine))
        return "/".join(mine[-length:])

    return [Entry(name(entry), entry.contents, entry.evaluated, entry.settings) for entry in entries]


def _rows(entries: Sequence[Entry], *, each: bool) -> tuple[Row, ...]:
    labels = _data_labels(entries)
    alike: dict[tuple[str, str], list[Entry]] = {}
    for entry in sorted(entries, key=lambda one: list(labels.values()).index(labels[one])):
        alike.setdefault((labels[entry], entry.objective), []).append(entry)
    rows = []
    for (data, objective), members in alike.items():
        keys = [key for key in _keys_that_differ(members) if key not in _ROW_NAMES or key == "policy.model"]
        told = {entry: _told(entry, keys, members) for entry in members}
        groups: dict[Any, list[Entry]] = {}
        for entry in members:
            groups.setdefault(entry.name if each else content_hash(entry.telling), []).append(entry)
        for group in groups.values():
            settings = ", ".join(filter(None, (told[group[0]], group[0].name if each else "")))
            rows.append(Row(data, objective, settings, tuple(group)))
    return tuple(rows)


def _data_labels(entries: Sequence[Entry]) -> dict[Entry, str]:
    """How each run's pairs are called: by the method that made them, else by as much of their path as tells them
    apart."""
    paths = {path for entry in entries if (path := entry.contents.setting("train.data"))}
    return {entry: _data_label(entry, paths) for entry in entries}


def _data_label(entry: Entry, paths: set[str]) -> str:
    data = entry.contents.setting("train.data")
    if not data:
        return entry.contents.setting("create.method") or _ABSENT
    origin = Path(data) if Path(data).is_dir() else Path(data).parent
    if (origin / "recipe.yaml").is_file() and (made := _method_of(origin)):
        return made
    parts = Path(data).parts
    ends = {path: Path(path).parts for path in paths if path != data}
    length = next((n for n in range(1, len(parts) + 1) if all(end[-n:] != parts[-n:] for end in ends.values())), 1)
    return "/".join(parts[-length:])


def _method_of(folder: Path) -> str:
    try:
        return Contents(Run(folder)).setting("create.method") or ""
    except AnchoredError:
        return ""


def _keys_that_differ(entries: Sequence[Entry]) -> list[str]:
    keys = dict.fromkeys(key for entry in entries for key in entry.telling)
    return [key for key in keys if len({short(entry.telling.get(key, _ABSENT)) for entry in entries}) > 1]


def _told(entry: Entry, keys: Sequence[str], entries: Sequence[Entry]) -> str:
    """What tells an entry from others; of a section that others lack only that it is there, if it is alike in all."""
    lacking = {key for key in keys if any(other.startswith(f"{key}.") for other in keys)}
    names = spelt(keys)
    told: dict[str, str] = {}
    for key in keys:
        section = next((one for one in lacking if key.startswith(f"{one}.")), None)
        have = {short(other.telling[key]) for other in entries if key in other.telling}
        if key in entry.telling and section and len(have) == 1:
            told[section] = f"with {section.split('.')[-1]}"
        elif key in entry.telling:
            told[key] = f"{names[key]}={short(entry.telling[key])}"
    return ", ".join(told.values())


def spelt(keys: Sequence[str]) -> dict[str, str]:
    """Each dotted key by its last part, or by as many as tell it apart and say something."""

    def name(key: str) -> str:
        parts = key.split(".")
        least = 2 if parts[-1] in _SAY_LITTLE and len(parts) > 1 else 1
        others = [other.split(".") for other in keys if other != key]
        length = next(
            (n for n in range(least, len(parts) + 1) if all(o[-n:] != parts[-n:] for o in others)), len(parts)
        )
        return ".".join(parts[-length:])

    return {key: name(key) for key in keys}


def _differing(entries: Sequence[Entry]) -> dict[str, dict[str, str]]:
    values = {entry: {**entry.telling, **entry.seeds} for entry in entries}
    keys = dict.fromkeys(key for entry in entries for key in values[entry])
    found = {}
    for key in keys:
        told = {entry.name: short(values[entry].get(key, _ABSENT)) for entry in entries}
        # what another method does not use is no difference
        known = {text for text in told.values() if not (key.startswith("create.") and text == _ABSENT)}
        if len(known) > 1:
            found[key] = told
    return found


def _shown(entries: Sequence[Entry], views: Sequence[str]) -> tuple[Sheet, ...]:
    """Of each benchmark the sheets in the views asked for, else in its first one."""
    sheets = list(dict.fromkeys(sheet for entry in entries for sheet in entry.sheets))
    known = {benchmark: _views(entries, benchmark) for benchmark in dict.fromkeys(sheet.benchmark for sheet in sheets)}
    every = dict.fromkeys(view for found in known.values() for view in found)
    for view in views:
        if view not in every:
            raise DataError(f"--view {view}: no benchmark of these runs has it; they have {', '.join(every)}")
    wanted = {name: [view for view in views if view in found] or found[:1] for name, found in known.items()}
    shown = [sheet for sheet in sheets if sheet.view in wanted[sheet.benchmark]]
    order = list(known)
    return tuple(
        sorted(shown, key=lambda s: (order.index(s.benchmark), wanted[s.benchmark].index(s.view), sheets.index(s)))
    )


def _views(entries: Sequence[Entry], benchmark: str) -> list[str]:
    """In the order of a run that has the most of them: one that lacks the first view does not say which it is."""
    found = [[sheet.view for sheet in entry.sheets if sheet.benchmark == benchmark] for entry in entries]
    return list(dict.fromkeys(view for views in sorted(found, key=len, reverse=True) for view in views))


def _notes(rows: Sequence[Row], sheets: Sequence[Sheet]) -> Iterable[str]:
    entries = [entry for row in rows for entry in row.entries]
    for row in rows:
        for sheet in sheets:
            lacking = [entry.name for entry in row.entries if sheet not in entry.sheets]
            if 0 < len(lacking) < len(row.entries):
                yield (
                    f"{row.name}: of its {len(row.entries)} runs {several(lacking)} "
                    f"{'has' if len(lacking) == 1 else 'have'} no such scores on {sheet.benchmark} ({sheet.view})"
                )
        if len({content_hash(entry.seeds) for entry in row.entries}) < len(row.entries):
            yield (
                f"{row.name}: of its {len(row.entries)} runs some have the same settings and seeds, yet other "
                "scores; they are counted as runs of their own"
            )
    for entry in entries:
        if entry.run.metrics.exists() and not entry.contents.summary("train"):
            yield f"{entry.name}: its training has not come to its end; its checkpoints so far are compared"
    yield from _starting_models(entries, sheets)
    yield from _choices(entries, sheets)


def _choices(entries: Sequence[Entry], sheets: Sequence[Sheet]) -> Iterable[str]:
    """Where the chosen checkpoints of runs were not chosen alike."""
    for sheet in sheets:
        ways: dict[str, list[str]] = {}
        for entry in entries:
            chosen = entry.evaluated.chosen_for(sheet.benchmark, sheet.view) if sheet in entry.sheets else None
            if chosen:
                ways.setdefault(f"the best {len(chosen.checkpoints)} on {chosen.on}", []).append(entry.name)
        if len(ways) > 1:
            told = "; ".join(f"{way} ({several(names)})" for way, names in ways.items())
            yield (
                f"{sheet.benchmark}: checkpoints were not chosen alike: {told}. Set evaluate.select.on and "
                "evaluate.select.take alike, and evaluate again with --redo evaluate."
            )


def _starting_models(entries: Sequence[Entry], sheets: Sequence[Sheet]) -> Iterable[str]:
    policies = list(dict.fromkeys(entry.policy for entry in entries))
    if len(policies) > 1:
        yield (
            f"The runs start from {len(policies)} models ({', '.join(policies)}). Each improvement is on the run's own "
            "start, and the same number of points is not the same feat from another start."
        )
    for sheet in sheets:
        starts: dict[float, list[str]] = {}
        for entry in entries:
            board = entry.board(sheet.benchmark, sheet.view) if sheet in entry.sheets else None
            if board and board.start:
                starts.setdefault(round(board.start.score, 6), []).append(entry.name)
        if len(starts) > 1:
            told = several([f"{score:.2f} ({several(names)})" for score, names in starts.items()])
            yield f"{sheet.benchmark}: the starting models score {told}."


def _result(found: Sequence[tuple[Entry, Gain]], sheet: Sheet, category: str | None, on: str | None) -> Result:
    chosen = [one for entry, _ in found if (one := chosen_checkpoints(entry, sheet, on))] if category is None else []
    wholes = [entry.sheets[sheet] for entry, _ in found]
    scores = [
        (board.get(START, category), board.get(whole.max_checkpoint, category))
        for (entry, _), whole in zip(found, wholes, strict=True)
        if (board := entry.board(sheet.benchmark, sheet.view))
    ]
    lengths = [_length_change(entry, sheet, on) for entry, _ in found] if category is None else []
    return Result(
        runs=len(found),
        n=min(gain.n for _, gain in found),
        checkpoints=max(len(entry.evaluated.trained) for entry, _ in found),
        max=_estimate(gain.max for _, gain in found),
        mean=_estimate(gain.mean for _, gain in found),
        sd=statistics.fmean(gain.sd for _, gain in found),
        last=_estimate(gain.last for _, gain in found),
        start=_estimate_or_none(Interval(one.score, one.low, one.high) for one, _ in scores if one),
        best=_estimate_or_none(Interval(one.score, one.low, one.high) for _, one in scores if one),
        best_names=tuple(whole.max_checkpoint for whole in wholes),
        chosen=_estimate_or_none(one.gain for one in chosen),
        chosen_names=tuple(" + ".join(one.checkpoints) for one in chosen),
        length=_estimate_or_none(length for length in lengths if length),
    )


def _length_change(entry: Entry, sheet: Sheet, on: str | None) -> Interval | None:
    """Of the mean over checkpoints the ends are the means of theirs."""
    changes = entry.evaluated.length_changes.get(sheet.benchmark, {})
    chosen = chosen_checkpoints(entry, sheet, on)
    names = chosen.checkpoints if chosen else tuple(changes)
    if not names or any(name not in changes for name in names):
        return None
    mean = _estimate(changes[name] for name in names)
    return Interval(mean.value, mean.low, mean.high)


def _estimate(intervals: Iterable[Interval]) -> Estimate:
    found = list(intervals)
    value, low, high = (statistics.fmean(getattr(one, name) for one in found) for name in ("value", "low", "high"))
    between = float(np.std([one.value for one in found], ddof=1)) if len(found) > 1 else None
    return Estimate(value, low, high, between)


def _estimate_or_none(intervals: Iterable[Interval]) -> Estimate | None:
    found = list(intervals)
    return _estimate(found) if found else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
