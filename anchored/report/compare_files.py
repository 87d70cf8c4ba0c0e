"""A comparison as files: CSV, a number a column in full precision; LaTeX as the paper sets its tables; a page."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from anchored.errors import DataError
from anchored.report.compare import Comparison, Estimate, Row, Sheet
from anchored.report.compare_page import comparison_page
from anchored.report.compare_tables import (
    Cell,
    Grid,
    breakdown_grids,
    improvement_grids,
    improvement_notes,
    sheet_notes,
)
from anchored.report.differences import Differences
from anchored.runs import write_text

_ESCAPED = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "·": r"$\cdot$",
    "Δ": r"$\Delta$",
    "±": r"$\pm$",
    "−": r"$-$",
    "–": "--",
    "β": r"$\beta$",
}
_MOST_COLUMNS = 5
_LAST_LATIN = 0x17F
"""The last letter that every LaTeX sets as it is."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where the comparison is to be written."""

    csv: Path | None = None
    latex: Path | None = None
    html: Path | None = None


def check_outputs(to: Outputs) -> None:
    """Raise DataError where a file cannot be written, before anything is made for it."""
    given = {name: path for name, path in (("csv", to.csv), ("latex", to.latex), ("html", to.html)) if path}
    for name, path in given.items():
        if path.is_dir():
            raise DataError(f"--{name} {path}: is a folder; give the name of a file")
    for (name, path), (other, place) in combinations(given.items(), 2):
        if path.resolve() == place.resolve():
            raise DataError(f"--{name} and --{other} are the same file, {path}; give each its own")


def write_outputs(comparison: Comparison, found: Differences, to: Outputs, *, intervals: bool = True) -> list[Path]:
    """Write what is asked for, and return the files; differences get a CSV of their own, if there are any."""
    check_outputs(to)
    files = {}
    if to.csv:
        files[to.csv] = comparison_csv(comparison)
        if found.fields:
            files[to.csv.with_name(f"{to.csv.stem}-differences.csv")] = differences_csv(found)
    if to.latex:
        files[to.latex] = comparison_latex(comparison, intervals=intervals)
    if to.html:
        files[to.html] = comparison_page(comparison, found)
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    return list(files)


def comparison_latex(comparison: Comparison, *, intervals: bool = True) -> str:
    """Tables 2, 5 and 4, to \\input."""
    tables = []
    for grid in improvement_grids(comparison, intervals=intervals):
        sheets = sheet_notes(comparison, {column.over for column in grid.columns})
        notes = [*improvement_notes(comparison, [grid], "Bold: best of all; underlined: best of its data set"), *sheets]
        tables.append(latex_table(replace(grid, note=" ".join(notes))))
    tables += [latex_table(grid) for grid in breakdown_grids(comparison, intervals=intervals)]
    return "\n".join(["% Made by `anchored compare`. In the preamble: \\usepackage{booktabs,graphicx}", *tables])


def comparison_csv(comparison: Comparison) -> str:
    """A line for each row, benchmark, view and category (empty: the whole): Tables 2, 4 and 5 in one."""
    sheets = dict.fromkeys(sheet for entry in comparison.entries for sheet in entry.sheets)
    lines = [
        line
        for row in comparison.rows
        for sheet in sheets
        for category in (None, *comparison.categories(sheet))
        if (line := _csv_line(comparison, row, sheet, category))
    ]
    return _csv(lines)


def differences_csv(differences: Differences) -> str:
    """A line for each pair of rows that can be compared."""
    lines = [
        {
            **_of_sheet(field.sheet),
            "of": field.of,
            "chosen_on": field.on,
            "row": field.rows[pair.better].name,
            "gains_more_than": field.rows[pair.worse].name,
            "points": pair.points.value,
            "low": pair.points.low,
            "high": pair.points.high,
            "more_than_chance": pair.holds,
            "more_than_chance_among_all": pair.holds_among_all,
        }
        for field in differences.fields
        for pair in field.pairs
    ]
    return _csv(lines)


def _csv_line(comparison: Comparison, row: Row, sheet: Sheet, category: str | None) -> dict[str, Any] | None:
    found = comparison.result(row, sheet, category)
    if found is None:
        return None
    return {
        "data": row.data,
        "objective": row.objective,
        "settings": row.settings,
        "policy": row.policy,
        "runs": found.runs,
        "names": "; ".join(entry.name for entry in row.entries),
        **{
            key: "; ".join(dict.fromkeys(values[entry.name] for entry in row.entries))
            for key, values in comparison.differing.items()
        },
        "train_seconds": row.train_seconds,
        **_of_sheet(sheet),
        "category": category,
        "n": found.n,
        "checkpoints": found.checkpoints,
        **_numbers("start", found.start),
        **_numbers("best", found.best),
        "best_checkpoint": "; ".join(found.best_names),
        **_numbers("max_gain", found.max),
        **_numbers("mean_gain", found.mean),
        "sd_over_checkpoints": found.sd,
        **_numbers("last_gain", found.last),
        "chosen_on": comparison.chosen_on(sheet) if found.chosen else None,
        "chosen_checkpoints": "; ".join(found.chosen_names),
        **_numbers("chosen_gain", found.chosen),
        **_numbers("length_change", found.length),
    }


def _of_sheet(sheet: Sheet) -> dict[str, Any]:
    return {
        "benchmark": sheet.benchmark,
        "version": sheet.version,
        "view": sheet.view,
        "judge": sheet.judge,
        "limit": sheet.limit,
    }


def _numbers(name: str, number: Estimate | None) -> dict[str, float | None]:
    return {
        name: number.value if number else None,
        f"{name}_low": number.low if number else None,
        f"{name}_high": number.high if number else None,
        f"{name}_between_runs": number.between if number else None,
    }


def _csv(lines: Sequence[Mapping[str, Any]]) -> str:
    out = io.StringIO()
    if lines:
        writer = csv.DictWriter(out, lines[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return out.getvalue()


def latex_table(grid: Grid) -> str:
    """A grid as a table environment."""
    first = len(grid.labels)
    # over both columns of a page that has two
    kind = "table*" if len(grid.columns) > _MOST_COLUMNS else "table"
    lines = [
        rf"\begin{{{kind}}}[t]",
        r"\centering\footnotesize\setlength{\tabcolsep}{4pt}",
        rf"\caption{{{escaped(grid.title)}}}\smallskip",
        # as wide as it is, or as the page
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{'l' * first}{'r' * len(grid.columns)}}}",
        r"\toprule",
    ]
    if grid.has_headings:
        over = [rf"\multicolumn{{{width}}}{{c}}{{{escaped(text)}}}" for text, width in grid.headings]
        lines += [_row([*[""] * first, *over]), " ".join(_rules(grid.headings, first + 1))]
    lines += [_row(map(escaped, (*grid.labels, *(column.name for column in grid.columns)))), r"\midrule"]
    for place, line in enumerate(grid.lines):
        before = grid.lines[place - 1] if place else None
        new_group = before is None or before.group != line.group
        if before and new_group:
            lines.append(r"\midrule")
        labels = [escaped(label) for label in line.labels]
        if line.group and not new_group:
            labels[0] = ""
        lines.append(_row([*labels, *map(_latex_cell, line.cells)]))
        if any(cell.under for cell in line.cells):
            under = [rf"{{\scriptsize {_latex_numbers(cell.under)}}}" if cell.under else "" for cell in line.cells]
            lines.append(_row([*[""] * first, *under]))
    note = rf"\par\smallskip\parbox{{\linewidth}}{{\scriptsize {escaped(grid.note)}}}"
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}", note, rf"\end{{{kind}}}", ""])


def _rules(headings: Iterable[tuple[str, int]], column: int) -> list[str]:
    rules = []
    for text, width in headings:
        if text:
            rules.append(rf"\cmidrule(lr){{{column}-{column + width - 1}}}")
        column += width
    return rules


def _row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _latex_cell(cell: Cell) -> str:
    number = _latex_numbers(cell.text)
    if cell.mark == "**":
        number = rf"\textbf{{\boldmath {number}}}"
    elif cell.mark == "*":
        number = rf"\underline{{{number}}}"
    return " ".join(filter(None, (number, escaped(cell.after))))


def _latex_numbers(text: str) -> str:
    """Text whose numbers stand as the paper has them: no plus sign, a true minus."""
    return escaped(re.sub(r"\+(?=[\d.])", "", text))


def escaped(text: str) -> str:
    """Text that LaTeX sets letter by letter, whatever it holds; a letter that not every LaTeX has is named."""
    return "".join(_ESCAPED.get(letter) or _plain(letter) for letter in text)


def _plain(letter: str) -> str:
    code = ord(letter)
    if code < 0x20 or 0x7F <= code < 0xA0:
        return " "
    return letter if code <= _LAST_LATIN else f"U+{code:04X} "
