"""Where finished rows go: accepted ones to their set's file with their contrast, the others to the refused.

Rows are handed in one by one, in the order in which they are to stand, and none is kept in memory. What the stage
wants to know of them afterwards is counted here.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from anchored import contrast
from anchored.datasets_io import PairWriter
from anchored.records import Outcome, Pair

_COLUMNS = {"jaccard": float, "levenshtein": int, "length_ratio": float}


class RowFile:
    """One set's file. Use as a context manager: the file appears when the block succeeds."""

    def __init__(self, name: str, path: Path, refused: PairWriter, target: int | None = None) -> None:
        self.target = target
        """No more pairs than these are accepted."""
        self.outcomes: Counter[Outcome] = Counter()
        self.details: dict[Outcome, str] = {}
        """Of the first row of each outcome."""
        self._name = name
        self._accepted = PairWriter(path, extra=_COLUMNS)
        self._refused = refused
        self._means = contrast.Means("whitespace")

    @property
    def pairs(self) -> int:
        """How many rows were accepted."""
        return self.outcomes[Outcome.OK]

    def put(self, row: Pair) -> None:
        """Hand in the next row."""
        if row.outcome is Outcome.OK and self.pairs == self.target:
            row = replace(row, outcome=Outcome.SURPLUS, detail=f"create.target asks for {self.target} pairs")
        self.outcomes[row.outcome] += 1
        self.details.setdefault(row.outcome, row.detail)
        if row.outcome is not Outcome.OK:
            self._refused.write([row], {"set": [self._name]})
            return
        measured = contrast.compare(row)
        self._means.add(measured)
        self._accepted.write([row], {column: [getattr(measured, column)] for column in _COLUMNS})

    def contrast(self) -> contrast.MeanContrast:
        """Of the accepted rows."""
        return self._means.mean()

    def __enter__(self) -> Self:
        self._accepted.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._accepted.__exit__(*raised)
