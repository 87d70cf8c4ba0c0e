"""A comparison as finished text: the paper's Tables 2, 4 and 5 over runs, and the differences between rows.

A `Grid` is a table whose columns stand under headings and whose cells know their interval and whether they are the
best: the page and LaTeX show it as it is, a terminal as a plain `Table`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from string import ascii_lowercase
from typing import Literal

from anchored.report.compare import Comparison, Estimate, Result, Row, Sheet, several
from anchored.report.differences import Differences, Field
from anchored.report.tables import Table, characters, duration, signed

Mark = Literal["", "*", "**"]
"""Best of its data set; best of all."""

_ALPACA = "alpaca-eval"
"""The paper reports it for chosen checkpoints only, with the change in length."""
_MAX, _MEAN, _LAST, _CHOSEN, _LENGTH = "max Δ", "mean Δ (sd)", "last Δ", "chosen Δ", "length Δ"
_STARS = "** best of all, * best of its data set"
_MOST_ROWS_BROKEN_DOWN = 5
_MOST_PAIRS_LISTED = 6
DIFFERENCE_NOTE = (
    "Paired: both rows are scored on the same questions in each resample. 'yes': the interval leaves out 0, so other "
    "questions of this kind would hardly undo it; 'among all': not even after looking at every pair of a table. "
    "'cannot be told' is no proof that rows are equal. Nothing here says what another seed of training, another judge "
    "or another benchmark would do."
)


@dataclass(frozen=True, slots=True)
class Cell:
    """A number as text, what stands behind it and under it."""

    text: str = ""
    after: str = ""
    under: str = ""
    mark: Mark = ""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of numbers, and the heading that it shares with its neighbours."""

    over: str
    name: str


@dataclass(frozen=True, slots=True)
class Line:
    """A row of a grid; lines of the same group stand together."""

    group: str
    labels: tuple[str, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """A table of cells, with what a reader has to know."""

    title: str
    labels: tuple[str, ...]
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    note: str = ""

    @property
    def headings(self) -> list[tuple[str, int]]:
        """Each heading over the columns, with how many it is over."""
        found: list[tuple[str, int]] = []
        for column in self.columns:
            if found and found[-1][0] == column.over:
                found[-1] = (column.over, found[-1][1] + 1)
            else:
                found.append((column.over, 1))
        return found

    @property
    def has_headings(self) -> bool:
        return any(column.over for column in self.columns)

    def opens(self, place: int) -> bool:
        """Whether a column is the first under its heading."""
        return place == 0 or self.columns[place - 1].over != self.columns[place].over

    def without_intervals(self) -> Grid:
        lines = [replace(line, cells=tuple(replace(cell, under="") for cell in line.cells)) for line in self.lines]
        return replace(self, lines=tuple(lines))

    def as_table(self) -> Table:
        """The same for a terminal: a cell's interval on a line of its own, and stars for the best."""
        # a long name may be broken where it has parts
        columns = [" ".join(filter(None, (column.over.replace("/", "/\n"), column.name))) for column in self.columns]
        rows = [(*line.labels, *map(_plain_cell, line.cells)) for line in self.lines]
        return Table(self.title, (*self.labels, *columns), tuple(rows), self.note, len(self.labels))


@dataclass(frozen=True, slots=True)
class _Quantity:
    """A column of Table 2: which number of a result it is, and how it reads."""

    name: str
    of: Callable[[Result], Estimate | None]
    cell: Callable[[Result, Estimate], Cell]
    ranked: bool = True
    """Whether more is better."""


def terminal_tables(comparison: Comparison, found: Differences, *, intervals: bool = True) -> list[Table]:
    """All that a terminal shows of a comparison, in its order."""
    improvements = improvement_grids(comparison, intervals=intervals)
    notes = [*improvement_notes(comparison, improvements, _STARS), *sheet_notes(comparison)]
    improvements[-1] = replace(improvements[-1], note="\n".join(notes))
    grids = [*improvements, *breakdown_grids(comparison, intervals=intervals)]
    tables = [difference_table(one, comparison.sheets) for one in found.fields]
    if tables:
        tables[-1] = replace(tables[-1], note=DIFFERENCE_NOTE)
    return [*(grid.as_table() for grid in grids), *tables]


def improvement_grids(comparison: Comparison, *, whole: bool = False, intervals: bool = True) -> list[Grid]:
    """Table 2, of objectives on pairs, and Table 5, of those on single answers; `whole`: every number there is."""
    grids = []
    for unpaired, title in (
        (False, "Improvement on the starting model"),
        (True, "Improvement, objectives on single answers"),
    ):
        rows = [row for row in comparison.rows if row.is_unpaired is unpaired]
        if rows:
            grids.append(_improvement_grid(comparison, rows, title, whole=whole))
    return grids if intervals else [grid.without_intervals() for grid in grids]


def improvement_notes(comparison: Comparison, grids: Sequence[Grid], marks: str) -> list[str]:
    """What the columns of Tables 2 and 5 mean; `marks` says how the best are marked."""
    names = {column.name for grid in grids for column in grid.columns}
    results = [
        found for row in comparison.rows for sheet in comparison.sheets if (found := comparison.result(row, sheet))
    ]
    cells = [cell for grid in grids for line in grid.lines for cell in line.cells]
    below = ", with 95 % paired bootstrap intervals over questions" if any(cell.under for cell in cells) else ""
    told = [f"Points gained on each run's own starting model{below}."]
    if _MAX in names:
        counts = sorted({result.checkpoints for result in results})
        many = f"{counts[-1]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        told.append(
            f"{_MAX}: the best of {many} checkpoints, picked on these very questions, which flatters it"
            f"{' (the interval allows for that)' if below else ''}. {_MEAN}: over checkpoints."
        )
    ons = dict.fromkeys(on for sheet in comparison.sheets if (on := comparison.chosen_on(sheet)))
    if _CHOSEN in names:
        told.append(
            f"{_CHOSEN}: of the checkpoints that were best on {', '.join(ons)}, without the questions that both ask: "
            "nothing was picked on these."
        )
    if _LENGTH in names:
        told.append(
            f"{_LENGTH}: characters per answer against the starting model's, of the chosen checkpoints, else of all."
        )
    if any(result.runs > 1 for result in results):
        told.append(
            "Rows of several runs: means over them, of intervals too; ± is the standard deviation between runs."
        )
    if any(cell.mark for grid in grids for line in grid.lines for cell in line.cells):
        told.append(f"{marks}; the differences tell whether that is more than chance.")
    return told


def breakdown_grids(comparison: Comparison, *, whole: bool = False, intervals: bool = True) -> list[Grid]:
    """Table 4 of each sheet that has categories."""
    found = (breakdown_grid(comparison, sheet, whole=whole) for sheet in comparison.sheets)
    return [grid if intervals else grid.without_intervals() for grid in found if grid]


def breakdown_grid(comparison: Comparison, sheet: Sheet, *, whole: bool = False) -> Grid | None:
    """Table 4: by category, the starting model and the best checkpoint of each row, or of each data set's best row.

    `whole`: of each row however many there are. None where the sheet has no categories.
    """
    categories = comparison.categories(sheet)
    rows = [row for row in comparison.rows if comparison.result(row, sheet)]
    if not categories or not rows:
        return None
    shown = rows if whole or len(rows) <= _MOST_ROWS_BROKEN_DOWN else _best_of_each(comparison, rows, sheet)
    found = {(row, name): comparison.result(row, sheet, name) for row in shown for name in (None, *categories)}
    starts = _starts(comparison, shown, sheet)
    lines = []
    for name in (None, *categories):
        results = [found[row, name] for row in shown]
        of_starts = [found[rows_of[0], name] for rows_of in starts.values()]
        numbers = [one.start if one else None for one in of_starts] + [one.best if one else None for one in results]
        n = max((one.n for one in results if one), default=0)
        labels = ("overall" if name is None else name, f"{n:,}")
        lines.append(Line("", labels, tuple(_ranked([_score_cell(one) for one in numbers]))))
    columns = [Column("", name) for name in starts]
    for row in shown:
        of_all = found[row, None]
        by = f"({', '.join(dict.fromkeys(of_all.best_names))})" if of_all else ""
        columns.append(Column(row.data, " ".join(filter(None, (row.objective, row.settings, by)))))
    which = "for the best row of each data set" if len(shown) < len(rows) else "for each row"
    return Grid(
        f"Breakdown: {sheet_labels(comparison.sheets)[sheet]}",
        ("category", "n"),
        tuple(columns),
        tuple(lines),
        f"Percent, of the starting model and, {which}, of the best checkpoint, which was picked for its overall score "
        "on these questions: that flatters it. Intervals are 95 % ones; a category of few questions shows little.",
    )


def difference_table(field: Field, sheets: Sequence[Sheet]) -> Table:
    """By how much rows differ: of few rows all pairs, else the first one against each other."""
    listed = [pair for pair in field.pairs if len(field.pairs) <= _MOST_PAIRS_LISTED or pair.better == 0]
    rows = [
        (
            field.rows[pair.better].name,
            field.rows[pair.worse].name,
            points(pair.points.value),
            f"[{points(pair.points.low)}, {points(pair.points.high)}]",
            verdict(pair.holds, pair.holds_among_all),
        )
        for pair in listed
    ]
    return Table(
        f"Differences: {field_label(field, sheets)}",
        ("row", "gains more than", "points", "95 %", "more than chance?"),
        tuple(rows),
        names=2,
    )


def conclusion(field: Field) -> str:
    """In a sentence, what the row that gains most may be said to be better than."""
    level = [
        row.name for row, gain in zip(field.rows, field.improvements, strict=True) if gain == field.improvements[0]
    ]
    if len(level) == len(field.rows):
        return f"{several(level)} gain the same."
    found: dict[str, list[str]] = {}
    for pair in field.pairs:
        if pair.better == 0 and field.rows[pair.worse].name not in level:
            found.setdefault(verdict(pair.holds, pair.holds_among_all), []).append(field.rows[pair.worse].name)
    told = "; ".join(f"{answer}, against {several(names)}" for answer, names in found.items())
    gains = "gains" if len(level) == 1 else "gain"
    return f"{several(level)} {gains} most. More than chance? {told[:1].upper()}{told[1:]}."


def field_label(field: Field, sheets: Sequence[Sheet]) -> str:
    whose = "mean over checkpoints" if field.of == "mean" else f"checkpoints chosen on {field.on}"
    return f"{sheet_labels(sheets)[field.sheet]}, {whose}"


def verdict(holds: bool, among_all: bool) -> str:
    return "yes, among all" if holds and among_all else "yes, by itself" if holds else "cannot be told"


def sheet_labels(sheets: Sequence[Sheet]) -> dict[Sheet, str]:
    """What each is called: its benchmark, and what tells it from others on the same one."""
    labels = {}
    for sheet in sheets:
        alike = [other for other in sheets if other.benchmark == sheet.benchmark]
        parts = [sheet.benchmark]
        if len({other.view for other in alike}) > 1:
            parts.append(sheet.view)
        same_view = [other for other in alike if other.view == sheet.view]
        if len(same_view) > 1:
            kinds = list(dict.fromkeys((o.version, o.judge, o.limit) for o in alike))
            parts.append(f"({_letter(kinds.index((sheet.version, sheet.judge, sheet.limit)))})")
        labels[sheet] = " ".join(parts)
    return labels


def sheet_notes(comparison: Comparison, among: Collection[str] | None = None) -> list[str]:
    """What each sheet is, word for word, and that those of one benchmark do not compare; `among`: labels told of."""
    labels = sheet_labels(comparison.sheets)
    told = []
    for sheet, label in labels.items():
        if among is not None and label not in among:
            continue
        results = [found for row in comparison.rows if (found := comparison.result(row, sheet))]
        questions = sorted({found.n for found in results})
        counted = f"{questions[0]:,}" if len(questions) == 1 else f"{questions[0]:,} to {questions[-1]:,}"
        parts = [
            f"view {sheet.view}",
            f"version {sheet.version}" if sheet.version else "",
            f"judged by {sheet.judge}" if sheet.judge else "",
            f"{counted} questions" + (f" (limit {sheet.limit})" if sheet.limit else ""),
        ]
        told.append(f"{label}: {', '.join(filter(None, parts))}.")
    mixed = dict.fromkeys(
        sheet.benchmark
        for sheet in comparison.sheets
        if any(o != sheet and (o.benchmark, o.view) == (sheet.benchmark, sheet.view) for o in comparison.sheets)
    )
    told += [
        f"{name} was not the same for all runs (version, judge or number of questions), so it stands in columns of its "
        "own; numbers in different ones do not compare. Evaluate the runs alike to compare them."
        for name in mixed
    ]
    return told


def counted(number: int, thing: str) -> str:
    """`1 run`, `3 runs`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def points(value: float, decimals: int = 2) -> str:
    """A difference with its sign, a true minus."""
    return f"{round(value, decimals) + 0:+.{decimals}f}".replace("-", "−")


def _improvement_grid(comparison: Comparison, rows: Sequence[Row], title: str, *, whole: bool) -> Grid:
    labels = sheet_labels(comparison.sheets)
    found = {(row, sheet): comparison.result(row, sheet) for row in rows for sheet in comparison.sheets}
    columns: list[Column] = []
    cells: list[list[Cell]] = []
    for sheet in comparison.sheets:
        results = [found[row, sheet] for row in rows]
        for quantity in _quantities(comparison, sheet, whole=whole):
            column = _column(quantity, results)
            if any(cell.text for cell in column):
                columns.append(Column(labels[sheet], quantity.name))
                cells.append(_ranked(column, [row.data for row in rows]) if quantity.ranked else column)
    if any(row.train_seconds for row in rows):
        columns.append(Column("", "training"))
        cells.append([Cell(duration(row.train_seconds) if row.train_seconds else "") for row in rows])
    names, told = _labels(comparison, rows)
    lines = [Line(row.data, told[row], tuple(column[place] for column in cells)) for place, row in enumerate(rows)]
    return Grid(title, names, tuple(columns), tuple(lines))


def _quantities(comparison: Comparison, sheet: Sheet, *, whole: bool) -> list[_Quantity]:
    best = _Quantity(_MAX, lambda result: result.max, _gain_cell)
    mean = _Quantity(_MEAN, lambda result: result.mean, _mean_cell)
    chosen = _Quantity(_CHOSEN, lambda result: result.chosen, _gain_cell)
    length = _Quantity(_LENGTH, lambda result: result.length, _length_cell, ranked=False)
    if whole:
        last = _Quantity(_LAST, lambda result: result.last, _gain_cell)
        return [best, mean, last, chosen, length]
    has_length = sheet.benchmark == _ALPACA or len(comparison.sheets) == 1
    if sheet.benchmark == _ALPACA and comparison.chosen_on(sheet):
        return [chosen, length]
    return [best, mean, chosen, *([length] if has_length else [])]


def _column(quantity: _Quantity, results: Iterable[Result | None]) -> list[Cell]:
    cells = []
    for result in results:
        number = quantity.of(result) if result else None
        cells.append(quantity.cell(result, number) if result and number else Cell())
    return cells


def _gain_cell(_: Result, number: Estimate) -> Cell:
    return Cell(points(number.value), under=_under(number))


def _mean_cell(result: Result, number: Estimate) -> Cell:
    after = f"({result.sd:.2f})" if result.checkpoints > 1 else ""
    return Cell(points(number.value), after, _under(number))


def _length_cell(_: Result, number: Estimate) -> Cell:
    spread = f" ±{number.between:,.0f}" if number.between is not None else ""
    interval = f"[{characters(number.low)}, {characters(number.high)}]"
    return Cell(characters(number.value), under=f"{interval}{spread}")


def _score_cell(number: Estimate | None) -> Cell:
    if number is None:
        return Cell()
    return Cell(f"{number.value:.2f}", under=f"{number.low:.1f}–{number.high:.1f}")


def _under(number: Estimate) -> str:
    interval = f"[{signed(number.low)}, {signed(number.high)}]"
    return interval if number.between is None else f"{interval} ±{number.between:.2f}"


def _ranked(cells: Sequence[Cell], groups: Sequence[str] = ()) -> list[Cell]:
    """Two stars for the best of a column, one for the best of each group of several; equal texts are equally good."""
    values = [_number(cell.text) for cell in cells]
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return list(cells)
    tops: dict[str, list[float]] = {}
    for value, group in zip(values, groups, strict=False):
        if value is not None:
            tops.setdefault(group, []).append(value)
    marked = []
    for place, (cell, value) in enumerate(zip(cells, values, strict=True)):
        rivals = tops.get(groups[place], []) if groups else []
        mark: Mark = "**" if value == max(known) else "*" if len(rivals) > 1 and value == max(rivals) else ""
        marked.append(replace(cell, mark=mark))
    return marked


def _number(text: str) -> float | None:
    return float(text.replace("−", "-").replace(",", "")) if text else None


def _labels(comparison: Comparison, rows: Sequence[Row]) -> tuple[tuple[str, ...], Mapping[Row, tuple[str, ...]]]:
    """What the first columns are called, and what stands there for each row."""
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("data set", lambda row: row.data),
        ("objective", lambda row: row.objective),
    ]
    if len({row.policy for row in comparison.rows}) > 1:
        columns.append(("start", lambda row: row.policy))
    if any(row.settings for row in rows):
        columns.append(("settings", lambda row: row.settings))
    if any(len(row.entries) > 1 for row in comparison.rows):
        columns.append(("runs", lambda row: f"{len(row.entries)}"))
    return tuple(name for name, _ in columns), {row: tuple(text(row) for _, text in columns) for row in rows}


def _best_of_each(comparison: Comparison, rows: Sequence[Row], sheet: Sheet) -> list[Row]:
    best: dict[str, tuple[float, Row]] = {}
    for row in rows:
        result = comparison.result(row, sheet)
        if result and (row.data not in best or result.max.value > best[row.data][0]):
            best[row.data] = (result.max.value, row)
    return [row for _, row in best.values()]


def _starts(comparison: Comparison, rows: Sequence[Row], sheet: Sheet) -> dict[str, list[Row]]:
    """The starting models of rows, by a name for each: those of one score are one."""
    alike: dict[tuple[str, float | None], list[Row]] = {}
    for row in rows:
        result = comparison.result(row, sheet)
        start = round(result.start.value, 6) if result and result.start else None
        alike.setdefault((row.policy, start), []).append(row)
    if len(alike) == 1:
        return {"start": list(rows)}
    return {f"start of {', '.join(row.name for row in members)}": members for members in alike.values()}


def _plain_cell(cell: Cell) -> str:
    text = " ".join(filter(None, (f"{cell.text}{cell.mark}", cell.after)))
    # an interval is not broken
    return "\n".join(filter(None, (text, cell.under.replace(", ", ","))))


def _letter(place: int) -> str:
    return ascii_lowercase[place] if place < len(ascii_lowercase) else str(place + 1)
