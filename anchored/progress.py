"""How a stage tells what it is doing, without knowing who listens (a terminal, a log, nobody)."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Someone who listens to a stage."""

    def start(self, task: str, total: int | None, done: int = 0) -> None:
        """A task begins, `done` of its `total` steps being there already (None: the number is not known)."""

    def advance(self, task: str, by: int = 1, **facts: object) -> None:
        """`by` more steps are done; `facts` are the newest values worth showing (loss=0.91, ok=120)."""

    def finish(self, task: str) -> None:
        """The task is over."""

    def note(self, text: str) -> None:
        """One line for people that stays on the screen."""


class Silent:
    """Nobody listens."""

    def start(self, task: str, total: int | None, done: int = 0) -> None: ...

    def advance(self, task: str, by: int = 1, **facts: object) -> None: ...

    def finish(self, task: str) -> None: ...

    def note(self, text: str) -> None: ...
