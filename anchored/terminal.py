"""What a run shows in a terminal: live progress, notes, tables. In a log: a line now and then, no control codes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Self

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table as RichTable
from rich.text import Text

from anchored.report.tables import Table

_SECONDS_BETWEEN_LOG_LINES = 20.0


class Terminal:
    """Progress for people: bars where there is a terminal, lines where there is a log. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = _BarsAndFacts(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, _Task] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def start(self, task: str, total: int | None, done: int = 0) -> None:
        bar = self._bars.add_task(escape(task), total=total, completed=done, facts="")
        self._tasks[task] = _Task(bar, total, done)

    def advance(self, task: str, by: int = 1, **facts: object) -> None:
        state = self._tasks[task]
        state.done += by
        if facts:
            state.facts = "  ".join(f"{name} {_short(value)}" for name, value in facts.items())
        self._bars.update(state.bar, advance=by, facts=state.facts)
        now = time.monotonic()
        if not self._console.is_terminal and now - state.logged > _SECONDS_BETWEEN_LOG_LINES:
            state.logged = now
            self._line(task, state, state.left(now))

    def finish(self, task: str) -> None:
        state = self._tasks.pop(task)
        self._bars.remove_task(state.bar)
        self._line(task, state)

    def note(self, text: str) -> None:
        self._console.print(escape(text), highlight=False, soft_wrap=not self._console.is_terminal)

    def _line(self, task: str, state: _Task, left: float | None = None) -> None:
        of = f"/{state.total}" if state.total is not None else ""
        seconds = time.monotonic() - state.began
        to_go = f", {left:.0f} s left" if left is not None else ""
        self.note(f"  {task}: {state.done}{of} in {seconds:.0f} s{to_go}  {state.facts}".rstrip())


def print_table(console: Console, table: Table) -> None:
    """Print a table whole, whatever the terminal's width."""
    for part in _parts_that_fit(table, range(len(table.columns)), console.width):
        console.print(part)
    if table.note:
        console.print(f"[dim]{escape(table.note)}[/]", highlight=False, soft_wrap=not console.is_terminal)


def _parts_that_fit(table: Table, columns: Sequence[int], width: int) -> Iterator[RichTable]:
    """A table, tightened if it is too wide, and if it still is, in parts that each begin with what names the rows."""
    for padding in (1, 0):
        if widths := _widths(table, columns, width - 1 - len(columns) * (1 + 2 * padding)):
            yield _rich_table(table, columns, widths, padding)
            return
    names, others = columns[: table.names], columns[table.names :]
    parts = ([*names, *others[:n]] for n in range(len(others) - 1, 0, -1))
    fit = next((part for part in parts if _widths(table, part, width - 1 - len(part))), [*names, *others[:1]])
    yield _rich_table(table, fit, _widths(table, fit, width - 1 - len(fit)), 0)
    if rest := others[len(fit) - len(names) :]:
        yield from _parts_that_fit(table, [*names, *rest], width)


def _widths(table: Table, columns: Sequence[int], room: int) -> list[int] | None:
    """Characters for each column, such that no word is cut; None if there is no room for that."""
    texts = [[table.columns[column], *(row[column] for row in table.rows)] for column in columns]
    widths = [max(cell_len(word) for text in column for word in (text.split() or [""])) for column in texts]
    lines = [[line for text in column for line in text.split("\n")] for column in texts]
    wanting = [max(map(cell_len, column)) - width for column, width in zip(lines, widths, strict=True)]
    slack = room - sum(widths)
    if slack < 0:
        return None
    for place in sorted(range(len(widths)), key=wanting.__getitem__):
        more = min(wanting[place], slack)
        widths[place] += more
        slack -= more
    return widths


def _rich_table(table: Table, columns: Sequence[int], widths: Sequence[int] | None, padding: int) -> RichTable:
    title = None if len(columns) > table.names and columns[table.names] > table.names else table.title
    shown = RichTable(title=title, title_justify="left", title_style="bold", padding=(0, padding))
    for place, column in enumerate(columns):
        justify = "right" if table.is_numeric(column) else "left"
        shown.add_column(escape(table.columns[column]), justify=justify, width=widths[place] if widths else None)
    for row in table.rows:
        shown.add_row(*(escape(row[column]) for column in columns))
    return shown


class _BarsAndFacts(Bars):
    """A line for each task's bar, and one below for what is known of it: together they pass 80 columns."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            if task.fields["facts"]:
                yield Text(f"  {task.fields['facts']}", no_wrap=True, overflow="ellipsis")


class _Task:
    def __init__(self, bar: TaskID, total: int | None, done: int) -> None:
        self.bar, self.total, self.done = bar, total, done
        self.facts = ""
        self.began = self.logged = time.monotonic()
        self._first = done

    def left(self, now: float) -> float | None:
        """Seconds to go at the pace so far."""
        if self.total is None or self.done == self._first:
            return None
        return (now - self.began) / (self.done - self._first) * (self.total - self.done)


def _short(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
