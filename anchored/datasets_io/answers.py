"""Answers that people have already, found by the prompt they answer: of one model, or in judged pairs.

In: a source that `rows` reads, in a layout of `layouts`. A row belongs to a prompt with the same turns or, failing
that, with the same id, unless it says that it answers another text. Rows lie in a private file of SQLite's on the disk
while the object lasts, so there may be more of them than memory holds.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from anchored.datasets_io import layouts
from anchored.datasets_io.cells import Refused
from anchored.datasets_io.rows import Row, read
from anchored.errors import DataError
from anchored.records import Answer, Outcome, Pair, Prompt, content_hash, prompt_id

_BATCH = 1000


class AnswerFile:
    """The answers of one model; several rows of one prompt are its first, second and further answers."""

    def __init__(self, source: str | Path, model: str) -> None:
        self.source = str(source)
        self.model = model
        """Who wrote what a row does not ascribe to anybody."""
        self.rows = self.refused = 0
        self.first_refused = ""
        """What is wrong with the first row that holds no answer."""
        self._table = _Table(self._read())
        if not self.rows:
            why = f"none of its {self.refused} rows is an answer to a prompt; the first: {self.first_refused}"
            raise DataError(f"{source}: {why if self.refused else 'is empty; it needs an answer to a prompt'}")

    def find(self, prompt: Prompt, index: int = 0) -> Answer | None:
        """The `index`-th answer to a prompt."""
        found = self._table.find(prompt)
        if index >= len(found):
            return None
        text, model = json.loads(found[index])
        return Answer(text, model)

    def _read(self) -> Iterator[_Kept]:
        for row in read(self.source):
            try:
                found = layouts.answered(row.readable())
            except Refused as reason:
                self.refused += 1
                self.first_refused = self.first_refused or f"{row.where}: {reason}"
                continue
            self.rows += 1
            for answer in found.answers:
                yield _kept(found.id, found.prompt, json.dumps([answer.text, answer.model or self.model]))


class JudgedData:
    """Pairs that somebody has judged: UltraFeedback's scored completions, or any layout of pairs, without margins."""

    def __init__(self, source: str | Path, split: str | None = None) -> None:
        self.source = str(source)
        self._table = _Table(_judged(read(source, split)))

    def find(self, prompt: Prompt) -> Pair | None:
        """The pair of a prompt: the first that is one, else a refused one with its outcome and without answers."""
        pairs = [_pair(prompt, value) for value in self._table.find(prompt)]
        return next((pair for pair in pairs if pair.outcome is Outcome.OK), pairs[0] if pairs else None)


def read_questions(source: str | Path) -> Iterator[str]:
    """The questions of a benchmark, each with the passage that it is about; raises DataError where there is none."""
    found, refused = 0, ""
    for row in read(source):
        try:
            prompt = layouts.prompt(row.readable())
        except Refused as reason:
            refused = refused or f"; the first: {row.where}: {reason}"
            continue
        found += 1
        yield "\n".join([layouts.passage(row.columns), *(message.content for message in prompt.messages)])
    if not found:
        raise DataError(f"{source}: holds no question{refused}")


def check_readable(source: str | Path) -> None:
    """Raise a DataError for a source that is not there or holds nothing that can be read."""
    if next(iter(read(source)), None) is None:
        raise DataError(f"{source}: is empty")


class _Kept(NamedTuple):
    """A row on its way into the table."""

    id: str
    content: str
    """The prompt's turns; empty where the row names its prompt by id alone."""
    gist: str
    value: str


class _Table:
    """Values by prompt."""

    def __init__(self, rows: Iterable[_Kept]) -> None:
        # without a name it is a file that the system deletes by itself
        self._rows = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        try:
            self._rows.execute("pragma journal_mode = off")
            self._rows.execute("create table rows (place integer primary key, id, content, gist, value)")
            remaining = iter(rows)
            while batch := list(islice(remaining, _BATCH)):
                self._rows.execute("begin")
                self._rows.executemany("insert into rows (id, content, gist, value) values (?, ?, ?, ?)", batch)
                self._rows.execute("commit")
            for column in ("id", "content"):
                self._rows.execute(f"create index by_{column} on rows ({column})")
        except sqlite3.Error as error:
            raise DataError(
                f"the answers do not fit on the disk ({error}); set SQLITE_TMPDIR to a larger one"
            ) from None

    def find(self, prompt: Prompt) -> list[str]:
        """The values of a prompt, in the source's order."""
        by_content = self._values("content = ?", prompt_id(prompt.messages))
        return by_content or self._values("id = ? and gist in ('', ?)", prompt.id, _gist(prompt))

    def _values(self, where: str, *of: str) -> list[str]:
        return [value for (value,) in self._rows.execute(f"select value from rows where {where} order by place", of)]


def _judged(rows: Iterator[Row]) -> Iterator[_Kept]:
    for row in rows:
        try:
            prompt = layouts.prompt(row.readable())
        except Refused:  # nobody will ask for it
            continue
        try:
            pair = layouts.pair(row.columns)
        except Refused as reason:
            pair = Pair(prompt, Answer(""), Answer(""), outcome=reason.outcome, detail=f"{row.where}: {reason}")
        answers = [(answer.text, answer.model) for answer in (pair.chosen, pair.rejected)]
        value = json.dumps([*answers, pair.rational, str(pair.outcome), pair.detail])
        yield _kept(layouts.own_id(row.columns), prompt, value)


def _pair(prompt: Prompt, value: str) -> Pair:
    chosen, rejected, rational, outcome, detail = json.loads(value)
    answers = Answer(*chosen), Answer(*rejected)
    return Pair(prompt, *answers, rational=rational, outcome=Outcome(outcome), detail=detail)


def _kept(id: str, prompt: Prompt | None, value: str) -> _Kept:
    return _Kept(id, prompt_id(prompt.messages) if prompt else "", _gist(prompt) if prompt else "", value)


def _gist(prompt: Prompt) -> str:
    """The last turn's words: what two spellings of one prompt share."""
    return content_hash(prompt.messages[-1].content.split())[:16]
