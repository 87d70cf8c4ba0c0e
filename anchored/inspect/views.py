"""Which rows a reader asked for, in which order, and how many there are of what else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from anchored.inspect.rows import Labels, Rows
from anchored.report.pair_rows import choices

Order = Literal["files", "unlike", "alike", "shorter", "longer"]
"""As in the files; by Jaccard, the least or the most alike first; by length ratio, the lowest or the highest first."""
ORDERS: tuple[Order, ...] = get_args(Order)

UNDECIDED = "undecided"
DECIDED = (UNDECIDED, "keep", "drop", "edit")
"""The places of these are the codes of the rows' decisions."""


@dataclass(frozen=True, slots=True)
class Query:
    """What a reader asked for; an empty value asks for all."""

    show: str = ""
    """A group (training, held-out, refused) or an outcome."""
    decision: str = ""
    """One of DECIDED."""
    method: str = ""
    search: str = ""
    order: str = "files"


@dataclass(frozen=True, slots=True)
class View:
    """The rows that meet a query, in its order, and for each filter how many rows each choice would leave."""

    rows: NDArray[np.int64]
    shows: list[list[Any]]
    """[name, label, rows] of each choice."""
    decisions: list[list[Any]]
    methods: list[list[Any]]


def look(rows: Rows, decided: NDArray[np.int8], query: Query, also: Sequence[int] = ()) -> View:
    """The view of a query; `decided` holds a code of each row, `also` rows that the search is to find, too."""
    every = np.ones(len(rows), bool)
    said = rows.saying(query.search).copy() if query.search else every
    said[list(also)] = True
    shown = rows.groups.are(query.show) | rows.outcomes.are(query.show) if query.show else every
    settled = decided == DECIDED.index(query.decision) if query.decision else every
    made = rows.methods.are(query.method) if query.method else every
    found = np.flatnonzero(said & shown & settled & made)
    return View(
        rows=_ordered(rows, found, query.order),
        shows=_shows(rows, said & settled & made),
        decisions=_counts(Labels(list(DECIDED), decided.astype(np.int32)), said & shown & made),
        methods=_counts(rows.methods, said & shown & settled),
    )


def _ordered(rows: Rows, found: NDArray[np.int64], order: str) -> NDArray[np.int64]:
    if order == "files":
        return found
    values = rows.jaccards(found) if order in ("unlike", "alike") else rows.length_ratios[found]
    sign = -1 if order in ("alike", "longer") else 1
    # what cannot be measured comes last either way
    return found[np.argsort(sign * values, kind="stable")]


def _shows(rows: Rows, among: NDArray[np.bool_]) -> list[list[Any]]:
    outcomes = len(rows.outcomes.names)
    both = rows.groups.codes[among].astype(np.int64) * outcomes + rows.outcomes.codes[among]
    counts = {
        (rows.groups.names[code // outcomes], rows.outcomes.names[code % outcomes]): int(count)
        for code, count in enumerate(np.bincount(both))
        if count
    }
    found = [[choice.name, choice.label, choice.rows] for choice in choices(counts)]
    return [["", "all rows", sum(counts.values())], *(choice for choice in found if choice[0] != "all")]


def _counts(labels: Labels, among: NDArray[np.bool_]) -> list[list[Any]]:
    counts = np.bincount(labels.codes[among], minlength=len(labels.names))
    return [[name, name, int(count)] for name, count in zip(labels.names, counts, strict=True)]
