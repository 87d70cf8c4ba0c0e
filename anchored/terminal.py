"""What a run shows in a terminal: live progress and notes. In a log file: a line now and then, no control codes."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
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

_SECONDS_BETWEEN_LOG_LINES = 20.0


class Terminal:
    """Progress for people: bars where there is a terminal, lines where there is a log. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
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
        self._bars.update(state.bar, advance=by, facts=escape(state.facts))
        now = time.monotonic()
        if not self._console.is_terminal and now - state.logged > _SECONDS_BETWEEN_LOG_LINES:
            state.logged = now
            self._line(task, state)

    def finish(self, task: str) -> None:
        state = self._tasks.pop(task)
        self._bars.remove_task(state.bar)
        self._line(task, state)

    def note(self, text: str) -> None:
        self._console.print(escape(text), highlight=False)

    def _line(self, task: str, state: _Task) -> None:
        of = f"/{state.total}" if state.total is not None else ""
        seconds = time.monotonic() - state.began
        self.note(f"  {task}: {state.done}{of} in {seconds:.0f} s  {state.facts}".rstrip())


class _Task:
    def __init__(self, bar: TaskID, total: int | None, done: int) -> None:
        self.bar, self.total, self.done = bar, total, done
        self.facts = ""
        self.began = self.logged = time.monotonic()


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
