"""Pairs and labelled answers as rows of a file, in the layouts that people train on.

    trl        prompt, chosen, rejected: messages, the answers alone
    implicit   chosen, rejected: full turns
    clair32k   prompt (string: the last user turn); chosen, rejected: full turns (ultrafeedback_clair_32k)
    h4         as clair32k, with messages (the chosen turns) and scores (ultrafeedback_binarized)
    unpaired   prompt, completion: messages; label: true or false. Two rows a pair

Beside them stands what is known of the pair, which reads back: its id, method, rational, models. `PairWriter` takes
them batch by batch and holds no more than one row group; its file appears whole, or not at all.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal, Protocol, Self, get_args

from anchored.datasets_io.cells import well_formed
from anchored.datasets_io.places import Place, written_whole
from anchored.errors import DataError
from anchored.records import Answer, LabelledAnswer, Message, Pair, TrainingRow, prompt_id
from anchored.runs import one_line

Layout = Literal["trl", "implicit", "clair32k", "h4", "unpaired"]

Row = dict[str, Any]
Types = Mapping[str, type]
"""What the cells of each column are: str, int, float or bool, `list` for turns, `NoneType` where there is nothing."""

_PAIR_NOTES: Types = dict.fromkeys(("method", "rational", "chosen_model", "rejected_model", "outcome", "detail"), str)
_ABOUT_PAIR: Types = {"id": str, "prompt_id": str, **_PAIR_NOTES}
_ABOUT_ANSWER: Types = dict.fromkeys(("id", "prompt_id", "method", "rational", "model"), str)
_SIDES: Types = {"chosen": list, "rejected": list}
_SCORES: Types = {"score_chosen": float, "score_rejected": float}

COLUMNS: Mapping[Layout, Types] = {
    "trl": {"prompt": list, **_SIDES, **_ABOUT_PAIR},
    "implicit": {**_SIDES, **_ABOUT_PAIR},
    "clair32k": {"prompt": str, **_SIDES, **_ABOUT_PAIR},
    "h4": {"prompt": str, "prompt_id": str, **_SIDES, "messages": list, **_SCORES, "id": str, **_PAIR_NOTES},
    "unpaired": {"prompt": list, "completion": list, "label": bool, **_ABOUT_ANSWER},
}
"""What each layout always has, in the order of its file."""

ENDINGS = (".parquet", ".jsonl", ".jsonl.gz")

_ROWS_PER_GROUP = 1000


class PairWriter:
    """Writes rows batch by batch. Use as a context manager: the file takes its place when the block succeeds, and what
    stood there before stays when it does not.

        with PairWriter(path, extra={"jaccard": float}) as writer:
            writer.write(pairs, {"jaccard": [43.1, 57.0]})

    `extra` are further columns with the type of their cells. Raises DataError where it cannot write.
    """

    def __init__(self, path: Place, layout: Layout = "trl", extra: Types | None = None) -> None:
        check_layout(layout)
        self.path = path
        self._rows_of = _ROWS_OF[layout]
        self.columns: Types = {**COLUMNS[layout], **(extra or {})}
        self.rows = 0
        """Written so far."""
        self._open = _opener(path)
        self._waiting: list[Row] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with _named_if_it_fails(self.path), ExitStack() as stack:
            aside = stack.enter_context(written_whole(self.path))
            self._sink = stack.enter_context(self._open(aside, self.columns))
            self._stack = stack.pop_all()
        return self

    def write(self, rows: Sequence[TrainingRow], extra: Mapping[str, Sequence[Any]] | None = None) -> None:
        """Add a batch; `extra` has one value per row of it for each further column."""
        names = list(extra or {})
        cells = zip(*(extra or {}).values(), strict=True) if names else [()] * len(rows)
        for row, values in zip(rows, cells, strict=True):
            self._waiting += self._rows_of(row, dict(zip(names, values, strict=True)))
        with _named_if_it_fails(self.path):
            while len(self._waiting) >= _ROWS_PER_GROUP:
                self._write_group()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            # a full disk fails once more as the file is closed; the first error is the one to tell
            with suppress(OSError):
                self._stack.__exit__(kind, error, trace)
            return
        with _named_if_it_fails(self.path), self._stack:
            self._write_group()

    def _write_group(self) -> None:
        group, self._waiting = self._waiting[:_ROWS_PER_GROUP], self._waiting[_ROWS_PER_GROUP:]
        if group:
            self._sink.write(group)
        self.rows += len(group)


def write_pairs(
    path: Place, pairs: Sequence[Pair], extra: Mapping[str, Sequence[Any]] | None = None, layout: Layout = "trl"
) -> None:
    """Write pairs as parquet or JSONL, by the ending of `path`; `extra` are further columns, one value per pair."""
    extra = dict(extra or {})
    if any(pair.margin is not None for pair in pairs):
        extra["margin"] = [pair.margin for pair in pairs]
    with PairWriter(path, layout, {name: type_of(values) or str for name, values in extra.items()}) as writer:
        writer.write(pairs, extra)


def type_of(cells: Sequence[Any]) -> type | None:
    """What the cells of a column are, some of them missing: one of `Types`; None where no one type holds them."""
    kinds = {type(cell) for cell in cells if cell is not None}
    if kinds == {int, float}:
        return float
    found = kinds.pop() if kinds else type(None)
    return found if not kinds and found in (str, int, float, bool, type(None)) else None


def check_layout(layout: str) -> None:
    """A DataError where there is no such layout."""
    if layout not in get_args(Layout):
        raise DataError(f"layout {layout!r} is not known; choose from {', '.join(get_args(Layout))}")


def check_ending(path: Place) -> str:
    """The ending of a file to be written; a DataError where it is none that can be."""
    for ending in sorted(ENDINGS, key=len, reverse=True):
        if path.name.endswith(ending):
            return ending
    raise DataError(f"{path}: cannot tell the format from its ending; use {' or '.join(ENDINGS)}")


# ---- rows


def _explicit(row: TrainingRow, extra: Row) -> list[Row]:
    pair = _as_pair(row)
    return [{"prompt": _turns(pair.prompt.messages), **_answers(pair, ()), **_about(pair), **extra}]


def _implicit(row: TrainingRow, extra: Row) -> list[Row]:
    pair = _as_pair(row)
    return [{**_answers(pair, pair.prompt.messages), **_about(pair), **extra}]


def _beside_a_string(row: TrainingRow, extra: Row) -> list[Row]:
    pair = _as_pair(row)
    asked = pair.prompt.messages[-1].content if pair.prompt.messages else ""
    return [{"prompt": well_formed(asked), **_answers(pair, pair.prompt.messages), **_about(pair), **extra}]


def _binarized(row: TrainingRow, extra: Row) -> list[Row]:
    (shown,) = _beside_a_string(row, {})
    return [{**shown, "messages": shown["chosen"], **dict.fromkeys(_SCORES), **extra}]


def _unpaired(row: TrainingRow, extra: Row) -> list[Row]:
    if isinstance(row, LabelledAnswer):
        return [_labelled(row, extra)]
    scores = {True: extra.pop("score_chosen", None), False: extra.pop("score_rejected", None)}
    about = {"method": well_formed(row.method), "rational": well_formed(row.rational)}
    return [
        _labelled(
            LabelledAnswer(row.prompt, answer, good),
            {**about, "score": scores[good], **extra},
        )
        for good, answer in ((True, row.chosen), (False, row.rejected))
    ]


def _labelled(row: LabelledAnswer, extra: Row) -> Row:
    return {
        "prompt": _turns(row.prompt.messages),
        "completion": _turns([Message("assistant", row.answer.text)]),
        "label": row.desirable,
        "id": well_formed(row.prompt.id),
        "prompt_id": prompt_id(row.prompt.messages),
        "method": "",
        "rational": "",
        "model": well_formed(row.answer.model),
        **extra,
    }


_ROWS_OF: Mapping[Layout, Callable[[TrainingRow, Row], list[Row]]] = {
    "trl": _explicit,
    "implicit": _implicit,
    "clair32k": _beside_a_string,
    "h4": _binarized,
    "unpaired": _unpaired,
}


def _as_pair(row: TrainingRow) -> Pair:
    if isinstance(row, LabelledAnswer):
        raise TypeError("a layout of pairs has no place for a single answer")
    return row


def _about(pair: Pair) -> Row:
    about = {
        "id": pair.prompt.id,
        "prompt_id": prompt_id(pair.prompt.messages),
        "method": pair.method,
        "rational": pair.rational,
        "chosen_model": pair.chosen.model,
        "rejected_model": pair.rejected.model,
        "outcome": str(pair.outcome),
        "detail": pair.detail,
    }
    return {name: well_formed(text) for name, text in about.items()}


def _answers(pair: Pair, before: Sequence[Message]) -> Row:
    def said(answer: Answer) -> list[dict[str, str]]:
        return _turns((*before, Message("assistant", answer.text)))

    return {"chosen": said(pair.chosen), "rejected": said(pair.rejected)}


def _turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": well_formed(message.content)} for message in messages]


# ---- files


class _Sink(Protocol):
    def write(self, rows: Sequence[Row]) -> None: ...


class _Lines:
    """JSON lines; every line has every column."""

    def __init__(self, handle: IO[str], columns: Types) -> None:
        self._handle, self._columns = handle, columns

    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._handle.write(json.dumps({name: row.get(name) for name in self._columns}, ensure_ascii=False) + "\n")


class _Groups:
    """The row groups of a parquet file."""

    def __init__(self, path: Path, columns: Types) -> None:
        import pyarrow
        import pyarrow.parquet

        text = pyarrow.string()
        types = {
            list: pyarrow.list_(pyarrow.struct([("role", text), ("content", text)])),
            str: text,
            int: pyarrow.int64(),
            float: pyarrow.float64(),
            bool: pyarrow.bool_(),
            type(None): pyarrow.null(),
        }
        self._schema = pyarrow.schema([(name, types[kind]) for name, kind in columns.items()])
        self._table = pyarrow.Table
        self.file = pyarrow.parquet.ParquetWriter(path, self._schema)

    def write(self, rows: Sequence[Row]) -> None:
        self.file.write_table(self._table.from_pylist(list(rows), self._schema))


def _opener(path: Place) -> Callable[[Path, Types], AbstractContextManager[_Sink]]:
    return {".parquet": _parquet, ".jsonl": _jsonl, ".jsonl.gz": _zipped_jsonl}[check_ending(path)]


@contextmanager
def _parquet(path: Path, columns: Types) -> Iterator[_Sink]:
    groups = _Groups(path, columns)
    with groups.file:
        yield groups


@contextmanager
def _jsonl(path: Path, columns: Types) -> Iterator[_Sink]:
    with open(path, "w", encoding="utf-8") as handle:
        yield _Lines(handle, columns)


@contextmanager
def _zipped_jsonl(path: Path, columns: Types) -> Iterator[_Sink]:
    # without the file's name and the hour, the same rows are the same bytes
    with (
        open(path, "wb") as plain,
        gzip.GzipFile("", "wb", fileobj=plain, mtime=0) as zipped,
        io.TextIOWrapper(zipped, "utf-8") as handle,
    ):
        yield _Lines(handle, columns)


@contextmanager
def _named_if_it_fails(path: Place) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({one_line(error)}); free space or choose another folder") from None
