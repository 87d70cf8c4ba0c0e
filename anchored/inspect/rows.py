"""Every row of a data set in Arrow memory, each text once: found by what it says, and made a `Pair` when asked for.

In: a run folder, a file, a folder or a Hub id. What Anchored wrote as parquet is taken as it is, column by column;
anything else is read row by row. Nothing here knows of decisions.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
from numpy.typing import NDArray

from anchored import contrast
from anchored.datasets_io import Refusals, each_pair
from anchored.errors import DataError
from anchored.progress import Progress
from anchored.records import Answer, Message, Outcome, Pair, Prompt, Role
from anchored.report.contents import Group, row_files
from anchored.runs import Run, one_line

# its functions are made when it is imported
_compute: Any = pyarrow.compute

_TEXT = pyarrow.string()
_TURNS = pyarrow.list_(pyarrow.struct([("role", _TEXT), ("content", _TEXT)]))
_NOTES = ("rational", "detail", "method", "chosen_model", "rejected_model", "outcome")
_SCHEMA = pyarrow.schema(
    [
        ("group", _TEXT),
        ("id", _TEXT),
        ("prompt", _TURNS),
        ("chosen", _TEXT),
        ("rejected", _TEXT),
        *((name, _TEXT) for name in _NOTES),
        ("jaccard", pyarrow.float64()),
    ]
)
_SEARCHED = ("id", "chosen", "rejected", "rational", "detail")
_AT_ONCE = 2000
"""Foreign rows that become Arrow memory together."""
_SLICE = 4096
"""Rows that one thread searches at a time."""
_REMEMBERED = 12
"""Searches whose rows are known, for the next one is often a letter longer."""
_FEW = 0.2
"""Share of a slice below which its rows are picked out before they are searched."""
_TITLE = 160

_TASK = "reading rows"


@dataclass(frozen=True, slots=True)
class Labels:
    """A column of few values."""

    names: list[str]
    codes: NDArray[np.int32]
    """Of each row, the place of its value in `names`."""

    def of(self, row: int) -> str:
        return self.names[self.codes[row]]

    def are(self, name: str) -> NDArray[np.bool_]:
        """Which rows have this value."""
        return self.codes == (self.names.index(name) if name in self.names else -1)


def load_rows(source: str, split: str | None, progress: Progress) -> Rows:
    """The rows of a source, a run folder's refused ones included. Raises DataError where there is no row to look at."""
    run, path = run_of(source), Path(source).expanduser()
    if run is None and Run(path).recipe.exists():
        raise DataError(f"{source}: this run folder has no pairs; inspect what its train.data names, or make some")
    if run is None:
        table = _own(path, None) if path.is_file() and path.suffix == ".parquet" else None
        return _checked(source, Rows(_foreign(source, split, None, progress) if table is None else table))
    tables = []
    for group, path in row_files(run).items():
        table = _own(path, group)
        tables.append(_foreign(str(path), None, group, progress) if table is None else table)
    if not sum(map(len, tables)):
        raise DataError(f"{run.folder}: its files hold no row; see what `anchored create` said")
    # what reading took beside the rows
    pyarrow.default_memory_pool().release_unused()
    return Rows(pyarrow.concat_tables(tables))


def run_of(source: str) -> Run | None:
    """The run folder that a source is, if it is one with rows."""
    run = Run(Path(source).expanduser())
    return run if run.folder.is_dir() and row_files(run) else None


class Rows:
    """Rows in the order of their files."""

    def __init__(self, table: pyarrow.Table) -> None:
        self._table = table
        self.groups, self.outcomes, self.methods = (_labels(table[name]) for name in ("group", "outcome", "method"))
        lengths = [_compute.utf8_length(table[name]).to_numpy().astype(float) for name in ("chosen", "rejected")]
        self._both = (lengths[0] > 0) & (lengths[1] > 0)
        self.length_ratios = np.full(len(table), np.nan)
        """Characters of the chosen answer per character of the rejected one; NaN without both."""
        np.divide(*lengths, out=self.length_ratios, where=self._both)
        self._jaccards = np.where(self._both, table["jaccard"].to_numpy(), np.nan)
        self._searches: OrderedDict[str, NDArray[np.bool_]] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(os.cpu_count())

    def __len__(self) -> int:
        return len(self._table)

    def pair(self, row: int) -> Pair:
        """One row, refused or not."""
        text = {name: self._text(name, row) for name in ("id", "chosen", "rejected", *_NOTES)}
        return Pair(
            Prompt(
                tuple(Message(cast("Role", turn["role"]), turn["content"]) for turn in self._turns(row)), text["id"]
            ),
            Answer(text["chosen"], text["chosen_model"]),
            Answer(text["rejected"], text["rejected_model"]),
            method=text["method"],
            rational=text["rational"],
            outcome=Outcome(text["outcome"]),
            detail=text["detail"],
        )

    def title(self, row: int) -> str:
        """The beginning of what was asked last, on one line."""
        turns = self._turns(row)
        asked = turns[-1]["content"][:_TITLE].split() if turns else []
        return " ".join(asked) or f"(no prompt) {self._text('id', row)}"

    def jaccards(self, rows: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float64]:
        """Of these rows, measured where their file does not say; NaN without both answers."""
        asked = np.asarray(rows, np.int64)
        for row in asked[self._both[asked] & np.isnan(self._jaccards[asked])]:
            self._jaccards[row] = contrast.jaccard(self._text("chosen", row), self._text("rejected", row))
        return self._jaccards[asked]

    def with_ids(self, ids: Collection[str]) -> list[int]:
        """The rows whose prompts have these ids."""
        found = _compute.is_in(self._table["id"], value_set=pyarrow.array(list(ids), _TEXT))
        return np.flatnonzero(found.to_numpy()).tolist()

    def saying(self, words: str) -> NDArray[np.bool_]:
        """Which rows have these words, in either case, in their prompt, answers, reasoning, detail or id."""
        with self._lock:
            known = self._searches.pop(words, None)
            if known is None:
                known = self._search(words)
            self._searches[words] = known
            while len(self._searches) > _REMEMBERED:
                self._searches.popitem(last=False)
        return known

    def _search(self, words: str) -> NDArray[np.bool_]:
        # what holds the whole holds each part
        parts = [known for part, known in self._searches.items() if part in words]
        possible = min(parts, key=np.count_nonzero) if parts else np.ones(len(self), bool)
        starts = [at for at in range(0, len(self), _SLICE) if possible[at : at + _SLICE].any()]
        found = np.zeros(len(self), bool)
        slices = self._pool.map(lambda at: self._search_slice(words, at, possible), starts)
        for at, rows in zip(starts, slices, strict=True):
            found[rows + at] = True
        return found

    def _search_slice(self, words: str, at: int, possible: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Which of the possible rows of the slice that begins at `at` have the words, counted from there."""
        table = self._table.slice(at, _SLICE)
        rows = np.flatnonzero(possible[at : at + _SLICE])
        if len(rows) < _FEW * len(table):
            table = table.take(rows)
        else:
            rows = np.arange(len(table))
        found = np.zeros(len(table), bool)
        for name in _SEARCHED:
            found |= _has(table[name], words)
        before = 0
        for turns in table["prompt"].chunks:
            said = _has(_compute.struct_field(turns.flatten(), [1]), words)
            found[_compute.list_parent_indices(turns).to_numpy()[said] + before] = True
            before += len(turns)
        return rows[found]

    def _text(self, name: str, row: int) -> str:
        return self._table[name][int(row)].as_py() or ""

    def _turns(self, row: int) -> list[dict[str, str]]:
        return self._table["prompt"][int(row)].as_py() or []


def _has(texts: Any, words: str) -> NDArray[np.bool_]:
    found = _compute.match_substring(texts, words, ignore_case=True)
    return found.to_numpy(zero_copy_only=False) if isinstance(found, pyarrow.Array) else found.to_numpy()


def _labels(column: Any) -> Labels:
    encoded = column.combine_chunks().dictionary_encode()
    return Labels(encoded.dictionary.to_pylist(), encoded.indices.to_numpy())


def _own(path: Path, group: Group | None) -> pyarrow.Table | None:
    """A parquet file as `write_pairs` writes it; None if it is another one. Without a `group` the outcomes tell it."""
    try:
        schema = pyarrow.parquet.read_schema(path)
        types = {"id": _TEXT, "prompt": _TURNS, "chosen": _TURNS, "rejected": _TURNS} | dict.fromkeys(_NOTES, _TEXT)
        if any(name not in schema.names or schema.field(name).type != kind for name, kind in types.items()):
            return None
        columns = [*types, *({"jaccard"} & set(schema.names))]
        # buffers of the whole file would be a second copy of it: twice the time, a quarter more memory
        read = pyarrow.parquet.read_table(path, columns=columns, pre_buffer=False)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: is not a readable parquet file ({one_line(error)})") from None
    answers = {name: _only_turns(read[name]) for name in ("chosen", "rejected")}
    outcomes = set(_compute.unique(read["outcome"]).to_pylist())
    if any(column is None for column in answers.values()) or not outcomes <= set(Outcome):
        return None
    texts = {name: _compute.fill_null(read[name], "") for name in ("id", *_NOTES)}
    made = {"prompt": read["prompt"], **texts, **answers, "group": _groups(read["outcome"], group)}
    unknown = pyarrow.nulls(len(read), pyarrow.float64())
    made["jaccard"] = read["jaccard"] if "jaccard" in read.column_names else unknown
    return pyarrow.table({name: made[name] for name in _SCHEMA.names}).cast(_SCHEMA)


def _groups(outcomes: Any, group: Group | None) -> Any:
    accepted = _compute.equal(outcomes, str(Outcome.OK))
    return _compute.if_else(accepted, group or "training", group or "refused")


def _only_turns(column: Any) -> Any:
    """The texts of a column in which every cell holds one turn; None if a cell holds none or several."""
    if column.null_count or set(_compute.unique(_compute.list_value_length(column)).to_pylist()) - {1}:
        return None
    return pyarrow.chunked_array([_compute.struct_field(chunk.flatten(), [1]) for chunk in column.chunks], _TEXT)


def _foreign(source: str, split: str | None, group: Group | None, progress: Progress) -> pyarrow.Table:
    """Rows in any layout, one by one; without a `group`, those that cannot be a pair are the refused ones."""
    pairs = each_pair(source, split=split)
    tables = [_SCHEMA.empty_table()]
    progress.start(_TASK, None)
    while batch := list(islice(pairs, _AT_ONCE)):
        tables.append(_table(batch, group))
        progress.advance(_TASK, len(batch))
    progress.finish(_TASK)
    return pyarrow.concat_tables(tables)


def _table(pairs: Sequence[Pair], group: Group | None) -> pyarrow.Table:
    columns: dict[str, list[Any]] = {
        "group": [group or ("training" if pair.outcome is Outcome.OK else "refused") for pair in pairs],
        "id": [pair.prompt.id for pair in pairs],
        "prompt": [[{"role": turn.role, "content": turn.content} for turn in pair.prompt.messages] for pair in pairs],
        "chosen": [pair.chosen.text for pair in pairs],
        "rejected": [pair.rejected.text for pair in pairs],
        "chosen_model": [pair.chosen.model for pair in pairs],
        "rejected_model": [pair.rejected.model for pair in pairs],
        "jaccard": [None] * len(pairs),
    }
    for name in ("rational", "detail", "method", "outcome"):
        columns[name] = [str(getattr(pair, name)) for pair in pairs]
    return pyarrow.table({name: columns[name] for name in _SCHEMA.names}, _SCHEMA)


def _checked(source: str, rows: Rows) -> Rows:
    if not rows.outcomes.are(Outcome.OK).any():
        raise Refusals.of(map(rows.pair, range(len(rows)))).nothing_usable(source, "pair")
    return rows
