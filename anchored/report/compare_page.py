"""A comparison as one page: Tables 2, 4 and 5 with intervals, the differences of all pairs of rows, and the runs.

The page has no script and its policy forbids the browser to fetch anything; texts of the runs reach it escaped.
"""

from __future__ import annotations

from dataclasses import dataclass

from anchored.report.compare import SHOWN_OTHERWISE, Comparison, Sheet, spelt
from anchored.report.compare_tables import (
    DIFFERENCE_NOTE,
    breakdown_grids,
    conclusion,
    counted,
    field_label,
    improvement_grids,
    improvement_notes,
    points,
    sheet_labels,
    sheet_notes,
    verdict,
)
from anchored.report.differences import Difference, Differences, Field
from anchored.report.pages import content_policy, environment, styles
from anchored.report.tables import Table, signed

_MARKS = "Bold: best of all; underlined: best of its data set"


@dataclass(frozen=True, slots=True)
class Bar:
    """One row's improvement with its interval, placed in percent of the plot's width."""

    name: str
    points: str
    at: float
    left: float
    width: float


@dataclass(frozen=True, slots=True)
class Plot:
    """The rows' improvements on one sheet, on one scale."""

    title: str
    zero: float
    """Where no improvement is, in percent of the width."""
    bars: tuple[Bar, ...]
    note: str


@dataclass(frozen=True, slots=True)
class MatrixCell:
    """By how much one row gains more than another."""

    points: str
    interval: str
    verdict: str
    tone: str


@dataclass(frozen=True, slots=True)
class MatrixLine:
    """One row against those that gain less."""

    name: str
    points: str
    cells: tuple[MatrixCell | None, ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    """All differences of a field."""

    title: str
    names: tuple[str, ...]
    lines: tuple[MatrixLine, ...]
    conclusion: str


def comparison_page(comparison: Comparison, found: Differences) -> str:
    """The page as HTML."""
    from markupsafe import Markup

    grids = improvement_grids(comparison)
    return (
        environment()
        .get_template("compare.html")
        .render(
            title=f"{counted(len(comparison.entries), 'run')} compared",
            lede=_lede(comparison),
            warnings=[*comparison.notes, *found.notes],
            plots=[_plot(comparison, sheet) for sheet in comparison.sheets],
            improvements=grids,
            every_number=improvement_grids(comparison, whole=True),
            notes=[*improvement_notes(comparison, grids, _MARKS), *sheet_notes(comparison)],
            matrices=[_matrix(field, comparison) for field in found.fields],
            difference_note=DIFFERENCE_NOTE,
            breakdowns=breakdown_grids(comparison, whole=True),
            runs=_runs(comparison),
            left_out=comparison.left_out,
            style=Markup(styles("compare.css")),
            content_policy=content_policy(()),
        )
    )


def _lede(comparison: Comparison) -> str:
    rows = comparison.rows
    benchmarks = ", ".join(dict.fromkeys(sheet.benchmark for sheet in comparison.sheets))
    data = counted(len({row.data for row in rows}), "data set")
    objectives = counted(len({row.objective for row in rows}), "objective")
    return f"{data}, {objectives}; improvements on {benchmarks}."


def _plot(comparison: Comparison, sheet: Sheet) -> Plot:
    shown = [(row, result.mean) for row in comparison.rows if (result := comparison.result(row, sheet))]
    least = min(0.0, *(mean.low for _, mean in shown))
    most = max(0.0, *(mean.high for _, mean in shown))
    span = (most - least) or 1.0

    def place(value: float) -> float:
        return round(2 + 96 * (value - least) / span, 2)

    bars = [
        Bar(
            row.name,
            points(mean.value),
            place(mean.value),
            place(mean.low),
            round(place(mean.high) - place(mean.low), 2),
        )
        for row, mean in shown
    ]
    return Plot(
        sheet_labels(comparison.sheets)[sheet],
        place(0.0),
        tuple(bars),
        "Mean over checkpoints, in points, with 95 % intervals; dashed: the starting model.",
    )


def _matrix(field: Field, comparison: Comparison) -> Matrix:
    names = [row.name for row in field.rows]
    pairs = {(pair.better, pair.worse): pair for pair in field.pairs}
    lines = [
        MatrixLine(
            name,
            points(field.improvements[place]),
            tuple(_cell(pairs.get((place, other))) for other in range(1, len(names))),
        )
        for place, name in enumerate(names[:-1])
    ]
    return Matrix(field_label(field, comparison.sheets), tuple(names), tuple(lines), conclusion(field))


def _cell(pair: Difference | None) -> MatrixCell | None:
    if pair is None:
        return None
    tone = "better" if pair.holds and pair.holds_among_all else "likely" if pair.holds else ""
    return MatrixCell(
        points(pair.points.value),
        f"[{signed(pair.points.low)}, {signed(pair.points.high)}]",
        verdict(pair.holds, pair.holds_among_all),
        tone,
    )


def _runs(comparison: Comparison) -> Table:
    """Each run, with the settings in which the runs differ."""
    told = {key: values for key, values in comparison.differing.items() if key not in SHOWN_OTHERWISE}
    rows = [
        (
            entry.name,
            row.name,
            " / ".join(str(seed) for seed in entry.seeds.values()),
            *(values[entry.name] for values in told.values()),
            entry.policy,
            str(entry.run.folder),
        )
        for row in comparison.rows
        for entry in row.entries
    ]
    columns = ("run", "row", "seeds", *spelt(list(told)).values(), "starting model", "folder")
    return Table(
        "Runs", columns, tuple(rows), "Seeds: of the data (where the run made it), of training, of the evaluation."
    )
