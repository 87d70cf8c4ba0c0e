"""What the page asks for, as plain JSON values: views of the rows, one pair, decisions written down.

Many requests at once may call in. Decisions that others add to the same file show up with the next request.
"""

from __future__ import annotations

import math
import secrets
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from anchored import contrast
from anchored.datasets_io.cells import well_formed
from anchored.decisions import (
    ANSWERS,
    KINDS,
    Decision,
    DecisionFile,
    Decisions,
    Key,
    Kind,
    decide,
    edited,
    key_of,
    obstacle,
    unedited,
)
from anchored.errors import DataError
from anchored.inspect.rows import Rows
from anchored.inspect.views import DECIDED, ORDERS, Query, look
from anchored.records import Pair
from anchored.report.contents import Group
from anchored.report.contents import Row as PageRow
from anchored.report.pair_rows import MOST_CHARACTERS, for_page, parts

_VIEWS = 64
"""Views that are remembered; an older one is made anew by the page."""
MOST_ENTRIES = 500
_LARGE = 4e9
"""Characters of one answer times those of the other from which a distance would keep the reader waiting."""


@dataclass(frozen=True, slots=True)
class _State:
    """A row as it was made, before any edit, and what holds for it."""

    pair: Pair
    key: Key
    decision: Decision | None

    @property
    def now(self) -> Pair:
        """The pair with the texts that hold; its outcome is the file's."""
        is_edit = self.decision is not None and self.decision.kind == "edit"
        return edited(self.pair, self.decision) if self.decision and is_edit else self.pair


class Session:
    """The rows of one data set and the file of decisions about them."""

    def __init__(self, title: str, rows: Rows, file: DecisionFile) -> None:
        self.rows, self.path = len(rows), file.path
        self._title, self._rows, self._file = title, rows, file
        self._known: Decisions | None = None
        self._codes: NDArray[np.int8] = np.zeros(len(rows), np.int8)
        self._said: dict[int, str] = {}  # notes and edited texts, by row
        self._views: OrderedDict[str, NDArray[np.int64]] = OrderedDict()
        self._lock = threading.RLock()
        self._refresh()

    def about(self) -> dict[str, Any]:
        """What the page says of itself."""
        self._refresh()
        return {"title": self._title, "rows": self.rows, "file": str(self.path), **self._progress()}

    def view(self, query: Mapping[str, str]) -> dict[str, Any]:
        """The rows that meet a query, as a view to ask `entries` of, and the choices of each filter."""
        order, decision = query.get("order", "files"), query.get("decision", "")
        if order not in ORDERS:
            raise DataError(f"order {order!r} is not known; choose from {', '.join(ORDERS)}")
        if decision and decision not in DECIDED:
            raise DataError(f"decision {decision!r} is not known; choose from {', '.join(DECIDED)}")
        asked = Query(query.get("show", ""), decision, query.get("method", ""), query.get("search", "").strip(), order)
        self._refresh()
        found = look(self._rows, self._codes, asked, self._saying(asked.search))
        name = secrets.token_hex(8)
        with self._lock:
            self._views[name] = found.rows
            while len(self._views) > _VIEWS:
                self._views.popitem(last=False)
        return {
            "view": name,
            "total": len(found.rows),
            "shows": found.shows,
            "decisions": found.decisions,
            "methods": found.methods,
            **self._progress(),
        }

    def entries(self, view: str, start: int, count: int) -> dict[str, Any]:
        """A stretch of a view for the list; no rows, and `gone`, of a view that is forgotten."""
        with self._lock:
            rows = self._views.get(view)
            if rows is None:
                return {"rows": [], "gone": True}
            self._views.move_to_end(view)
        self._refresh()
        stretch = rows[max(start, 0) : max(start, 0) + min(count, MOST_ENTRIES)]
        return {"rows": [self._entry(int(row)) for row in stretch], "gone": False, **self._progress()}

    def pair(self, row: int) -> dict[str, Any]:
        """One row with everything about it, and the differences marked."""
        self._refresh()
        state = self._state(row)
        now, decision = state.now, state.decision
        group = cast("Group", self._rows.groups.of(row))
        return {
            **for_page(_measured(now, group)),
            "row": row,
            "decision": {"kind": decision.kind, "note": decision.note, "time": decision.time} if decision else None,
            "before": _before(state.pair, decision),
            "obstacle": obstacle(state.pair),
            "editable": bool(state.pair.prompt.messages),
            "entry": self._entry(row),
        }

    def texts(self, row: int) -> dict[str, str]:
        """Both answers whole, as they stand now, and as they were made."""
        state = self._state(row)
        return {name: getattr(state.now, name).text for name in ANSWERS}

    def decide(self, row: int, kind: str, texts: Mapping[str, str], note: str) -> dict[str, Any]:
        """Write down a decision; returns the row as `pair` does, and every row that it changed as `entries` does.

        Raises DataError for one that cannot be, or that cannot be written.
        """
        if kind not in KINDS:
            raise DataError(f"decision {kind!r} is not known; choose from {', '.join(KINDS)}")
        if unknown := sorted(set(texts) - set(ANSWERS)):
            raise DataError(f"an edit changes {' or '.join(ANSWERS)}, not {unknown[0]!r}")
        with self._lock:
            self._refresh()
            state = self._state(row)
            # texts that were not sent stay as they are now, an earlier edit included
            whole = {name: getattr(state.now, name).text for name in ANSWERS} | dict(texts)
            back = all(well_formed(text) == getattr(state.pair, name).text for name, text in whole.items())
            if kind == "edit" and back and state.decision:
                kind = "undo"
            changed = []
            if kind != "undo" or state.decision:
                changed = self._take_in(self._file.append(decide(state.pair, cast("Kind", kind), whole, note)))
            entries = [self._entry(one) for one in changed[:MOST_ENTRIES]]
            return {"pair": self.pair(row), "rows": entries, **self._progress()}

    def close(self) -> Decisions:
        """Wait for what is being written, and return what holds in the end."""
        self._file.close()
        return self._file.decisions

    def _refresh(self) -> None:
        with self._lock:
            self._take_in(self._file.refresh())

    def _take_in(self, new: Sequence[Decision]) -> list[int]:
        """Note what was decided; returns the rows that it is about, for a pair may stand there twice."""
        if self._file.decisions is not self._known:  # the file was replaced
            self._known = self._file.decisions
            self._codes[:] = 0
            self._said.clear()
        rows = self._rows.with_ids({decision.key.id for decision in new}) if new else []
        for row in rows:
            decision = self._state(row).decision
            self._codes[row] = DECIDED.index(decision.kind) if decision else 0
            self._said[row] = "\n".join((decision.note, *decision.edited.values())).lower() if decision else ""
        return rows

    def _saying(self, words: str) -> list[int]:
        """The rows about which people wrote these words."""
        with self._lock:
            return [row for row, said in self._said.items() if words.lower() in said]

    def _state(self, row: int) -> _State:
        if not 0 <= row < len(self._rows):
            raise DataError(f"there is no row {row}; the last one is {len(self._rows) - 1}")
        pair, decisions = self._rows.pair(row), self._file.decisions
        key = key_of(pair)
        # a file that `create` wrote after an edit holds the edited text
        if edit := decisions.edit_that_made(key):
            pair, key = unedited(pair, edit), edit.key
        return _State(pair, key, decisions.about(key))

    def _entry(self, row: int) -> dict[str, Any]:
        ratio, jaccard = self._rows.length_ratios[row], self._rows.jaccards([row])[0]
        return {
            "row": row,
            "title": self._rows.title(row),
            "outcome": self._rows.outcomes.of(row),
            "group": self._rows.groups.of(row),
            "jaccard": None if math.isnan(jaccard) else float(jaccard),
            "length_ratio": None if math.isnan(ratio) else float(ratio),
            "decision": DECIDED[self._codes[row]] if self._codes[row] else "",
        }

    def _progress(self) -> dict[str, Any]:
        counts = np.bincount(self._codes, minlength=len(DECIDED)).tolist()
        return {"decided": dict(zip(DECIDED[1:], counts[1:], strict=True))}


def _measured(pair: Pair, group: Group) -> PageRow:
    chosen, rejected = pair.chosen.text, pair.rejected.text
    if not (chosen and rejected) or len(chosen) * len(rejected) > _LARGE:
        return PageRow(pair, group)
    return PageRow(
        pair,
        group,
        contrast.jaccard(chosen, rejected),
        contrast.levenshtein(chosen, rejected),
        contrast.length_ratio(chosen, rejected),
    )


def _before(pair: Pair, decision: Decision | None) -> list[dict[str, Any]]:
    """Of an edited answer, what the edit changed."""
    if decision is None or decision.kind != "edit":
        return []
    changed = {name: (getattr(pair, name).text, text) for name, text in sorted(decision.edited.items())}
    return [
        {"name": name, "parts": parts(*(text[:MOST_CHARACTERS] for text in texts))} for name, texts in changed.items()
    ]
