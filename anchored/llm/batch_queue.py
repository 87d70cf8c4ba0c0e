"""Requests that wait for a batch, in the order in which they came."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from anchored.llm.chat import Reply, Request


@dataclass(eq=False, slots=True)
class Row:
    """A request that waits for its reply."""

    key: str
    request: Request
    size: int
    """Of its line, in bytes."""
    usd: float
    """The most that it can cost."""
    answer: asyncio.Future[Reply | None]
    """None: it must be asked live."""
    waiting: int = 0
    """How many wait for it."""
    left_out: frozenset[str] = frozenset()
    """Parameters that it was sent without."""


class Queue:
    """Rows in no batch."""

    def __init__(self) -> None:
        self._rows: dict[str, Row] = {}
        self.size = 0
        """Of their lines, in bytes."""
        self.asked_at = 0.0
        """When the latest came, by the loop's clock."""

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def first(self) -> Row:
        """The one that has waited longest."""
        return next(iter(self._rows.values()))

    def put(self, row: Row) -> None:
        """Add a row at the end."""
        self._rows[row.key] = row
        self.size += row.size
        self.asked_at = asyncio.get_running_loop().time()

    def drop(self, row: Row) -> None:
        """Take a row out, if it is there."""
        if self._rows.pop(row.key, None):
            self.size -= row.size

    def clear(self) -> None:
        """Forget all rows."""
        self._rows.clear()
        self.size = 0

    def cut(self, most_rows: int, most_bytes: float, affords: Callable[[float], bool]) -> list[Row]:
        """Take out the first rows, as many as may go together; one row alone may be of any size."""
        rows: list[Row] = []
        size, usd = 0, 0.0
        for row in self._rows.values():
            size, usd = size + row.size, usd + row.usd
            if not affords(usd) or len(rows) == most_rows or (rows and size > most_bytes):
                break
            rows.append(row)
        for row in rows:
            self.drop(row)
        return rows
