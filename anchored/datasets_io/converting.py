"""From any layout that people have to any that can be written, a batch of rows at a time.

What a source says beside the conversation (scores, names of sources) goes along where its cells are text or numbers.
Where pairs are asked for, a single answer waits for the other answer to its prompt. Every row of the source is written
or counted as refused, with why.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from anchored.datasets_io import layouts
from anchored.datasets_io.cells import Refused, kind, missing, note, number, well_formed
from anchored.datasets_io.places import Place, check_bucket
from anchored.datasets_io.refusals import Refusals
from anchored.datasets_io.rows import Row, read
from anchored.datasets_io.writing import COLUMNS, Layout, PairWriter, check_ending, check_layout, type_of
from anchored.errors import DataError
from anchored.progress import Progress, Silent
from anchored.records import LabelledAnswer, Message, Outcome, TrainingRow

Columns = Mapping[str, Any]

_BATCH = 1000
"""Rows; the first batch says which columns go along."""

_SCORES = ("score_chosen", "score_rejected")


@dataclass(frozen=True, slots=True)
class Converted:
    """What came of a source."""

    read: int
    """Rows of the source."""
    written: int
    """Rows of the new file: two a pair where it is unpaired."""
    refused: Refusals
    left_out: Mapping[str, str]
    """Columns that did not go along, or not everywhere, and what they held."""

    @property
    def kept(self) -> int:
        """Rows of the source that were written."""
        return self.read - self.refused.counts.total()


def convert(
    source: str | Path,
    out: Place,
    layout: Layout = "trl",
    *,
    split: str | None = None,
    force: bool = False,
    see: Callable[[TrainingRow], None] | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Write the pairs or labelled answers of a source in another layout; `see` is shown each of them.

    An `out` that exists is left alone unless `force`; a source without any usable row is a DataError.
    """
    check_layout(layout)
    check_ending(out)
    check_free(out, force)
    taken = _Taken(layout)
    rows = taken.rows(read(source, split))
    first = list(islice(rows, _BATCH))
    if not first:
        raise taken.refused.nothing_usable(source, "labelled answer" if layout == "unpaired" else "pair")
    carried = _Carried(layout, first)
    listener = progress or Silent()
    listener.start("rows", None)
    try:
        with PairWriter(out, layout, carried.types) as writer:
            for batch in _batches(chain(first, rows)):
                writer.write([one.row for one in batch], carried.cells(batch))
                listener.advance("rows", sum(one.of for one in batch))
                if see:
                    for one in batch:
                        see(one.row)
    finally:
        listener.finish("rows")
    return Converted(taken.read, writer.rows, taken.refused, carried.left_out)


def check_free(out: Place, force: bool) -> None:
    """A DataError where a file stands that must not be written over."""
    check_bucket(out)
    if out.is_dir():
        raise DataError(f"{out}: is a folder; name a file in it")
    if out.exists() and not force:
        raise DataError(f"{out}: exists already; choose another name, or write over it with --force")


@dataclass(frozen=True, slots=True)
class _Found:
    """What one row of the source, or two that belong together, came to be."""

    row: TrainingRow
    columns: Columns
    of: int


@dataclass(slots=True)
class _Taken:
    """Takes rows apart, and counts what becomes of them."""

    layout: Layout
    read: int = 0
    refused: Refusals = field(default_factory=Refusals)

    def rows(self, source: Iterable[Row]) -> Iterator[_Found]:
        waiting = _Waiting()
        for row in source:
            self.read += 1
            rows = 1
            try:
                columns = row.readable()
                if layouts.is_unpaired(columns):
                    if self.layout == "unpaired":
                        yield _Found(layouts.labelled(columns), columns, 1)
                        continue
                    both = waiting.matched(row.where, columns)
                    if both is None:
                        continue
                    rows, columns = 2, both
                pair = layouts.pair(columns)
            except Refused as reason:
                self.refused.add(reason.outcome, f"{row.where}: {reason}", rows)
            else:
                if pair.outcome is Outcome.OK:
                    yield _Found(pair, columns, rows)
                else:
                    self.refused.add(pair.outcome, pair.detail, rows)
        for where, desirable in waiting.left():
            missed = "an undesirable" if desirable else "a desirable"
            detail = f"{where}: an unpaired row without {missed} answer to the same prompt; a pair needs one of each"
            self.refused.add(Outcome.MALFORMED, detail)


@dataclass(frozen=True, slots=True)
class _Single:
    """An unpaired row."""

    where: str
    answer: LabelledAnswer
    columns: Columns


class _Waiting:
    """Single answers to whose prompts the other answer has not come yet; the first to come is the first to go."""

    def __init__(self) -> None:
        self._rows: dict[tuple[tuple[Message, ...], bool], deque[_Single]] = {}

    def matched(self, where: str, columns: Columns) -> Columns | None:
        """The columns of the pair that this row completes; None where it has to wait."""
        one = _Single(where, layouts.labelled(columns), columns)
        prompt, desirable = one.answer.prompt.messages, one.answer.desirable
        partners = self._rows.get((prompt, not desirable))
        if not partners:
            self._rows.setdefault((prompt, desirable), deque()).append(one)
            return None
        other = partners.popleft()
        if not partners:
            del self._rows[prompt, not desirable]
        return _as_pair(one, other) if desirable else _as_pair(other, one)

    def left(self) -> Iterator[tuple[str, bool]]:
        """Where the rows stand that still wait, and whether each is desirable."""
        for (_, desirable), rows in self._rows.items():
            for row in rows:
                yield row.where, desirable


def _as_pair(good: _Single, bad: _Single) -> Columns:
    prompt = good.answer.prompt
    beside = {name: cell for name, cell in good.columns.items() if name not in (*layouts.READ, "model", "score")}
    return {
        **beside,
        "id": prompt.id,
        "prompt": [{"role": message.role, "content": message.content} for message in prompt.messages],
        "chosen": [{"role": "assistant", "content": good.answer.answer.text}],
        "rejected": [{"role": "assistant", "content": bad.answer.answer.text}],
        "chosen_model": good.answer.answer.model,
        "rejected_model": bad.answer.answer.model,
        **{name: one.columns.get("score") for name, one in zip(_SCORES, (good, bad), strict=True)},
    }


class _Carried:
    """The columns that go along, chosen by the first rows."""

    def __init__(self, layout: Layout, first: Sequence[_Found]) -> None:
        self._layout: Layout = layout
        self.left_out: dict[str, str] = {}
        cells = [_beside(one, layout) for one in first]
        names = list(dict.fromkeys(name for row in cells for name in row))
        kinds = {name: type_of([row.get(name) for row in cells]) for name in names}
        self._kinds = {name: found for name, found in kinds.items() if found not in (None, type(None))}
        for row in cells:
            for name, cell in row.items():
                if kinds[name] is None and cell is not None:
                    self.left_out.setdefault(name, f"not text or numbers throughout: {kind(cell)}")
        self.types: dict[str, type] = dict(self._kinds)
        if layout == "unpaired" and not self.types.keys().isdisjoint(_SCORES):
            self.types = {"score": float} | {name: one for name, one in self.types.items() if name not in _SCORES}

    def cells(self, batch: Sequence[_Found]) -> dict[str, list[Any]]:
        """Their values in a batch."""
        rows = [_beside(one, self._layout) for one in batch]
        for row in rows:
            for name in row.keys() - self._kinds.keys() - self.left_out.keys():
                if row[name] is not None:
                    self.left_out[name] = f"first stands in a later row: {kind(row[name])}"
        return {name: [self._fitting(name, row.get(name)) for row in rows] for name in self._kinds}

    def _fitting(self, name: str, cell: Any) -> Any:
        wanted = self._kinds[name]
        if cell is None:
            return None
        if type(cell) is wanted and (wanted is not int or -(2**63) <= cell < 2**63):
            return well_formed(cell) if wanted is str else cell
        if wanted is float and type(cell) is int:
            return number(cell)
        self.left_out.setdefault(name, f"some cells are no {wanted.__name__}: {kind(cell)}")
        return None


def _beside(one: _Found, layout: Layout) -> dict[str, Any]:
    """What a row says beside the conversation and what a pair itself knows; what it is missing is None."""
    known = layouts.READ | COLUMNS["trl"].keys() | COLUMNS[layout].keys()
    cells = {name: None if missing(cell) else cell for name, cell in one.columns.items() if name not in known}
    if isinstance(one.row, LabelledAnswer):
        return cells | {name: note(one.columns, name) for name in ("method", "rational")}
    if layout == "unpaired":
        cells.pop("score", None)
    numbers = dict(zip(_SCORES, layouts.scores(one.columns), strict=True)) | {
        "margin": number(one.columns.get("margin"))
    }
    return cells | {name: value for name, value in numbers.items() if value is not None or name in cells}


def _batches(rows: Iterable[_Found]) -> Iterator[list[_Found]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, _BATCH)):
        yield batch
