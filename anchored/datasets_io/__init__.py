"""Reads preference data and prompts in the layouts that people have, and writes pairs in those that trainers take.

In: a file (.jsonl, .json, .parquet, .csv, each also .gz), a folder of such files, a run folder, or a Hub id (`rows`),
in any of the layouts of `layouts`. Out: frozen `Pair`s and `Prompt`s. A row that cannot be a pair is returned as
refused, with its outcome and with what is wrong in which line; only a source without any usable row is an error.
Nothing here compares, renders or scores texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from anchored.datasets_io import layouts
from anchored.datasets_io.cells import Refused
from anchored.datasets_io.prompts import PromptRows, Prompts, held_out_count, read_prompts
from anchored.datasets_io.refusals import Refusals, refusal
from anchored.datasets_io.rows import Row, read
from anchored.datasets_io.writing import Layout, PairWriter, write_pairs
from anchored.errors import DataError
from anchored.records import LabelledAnswer, Outcome, Pair, content_hash

__all__ = [
    "Layout",
    "PairRows",
    "PairWriter",
    "PromptRows",
    "Prompts",
    "Refusals",
    "TrainingRows",
    "checked",
    "describe_refused",
    "each_pair",
    "held_out_count",
    "read_pairs",
    "read_prompts",
    "read_rows",
    "read_training",
    "stream_pairs",
    "write_pairs",
]


@dataclass(frozen=True, slots=True)
class PairRows:
    """What a source of pairs holds."""

    pairs: list[Pair]
    refused: list[Pair]
    """Rows that cannot be a pair, or that our own files mark as refused; `outcome` and `detail` say why."""


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """What a source holds that one can train on: all pairs, or all labelled answers."""

    rows: list[Pair] | list[LabelledAnswer]
    refused: list[Pair]
    """Rows that are neither, or that our own files mark as refused; `outcome` and `detail` say why."""


def read_pairs(source: str | Path, *, take: int | None = None, seed: int = 0, split: str | None = None) -> PairRows:
    """The pairs of a source; with `take`, a uniform seeded sample of at most that many, in the data's order."""
    pairs, refused = [], []
    for pair in each_pair(source, split=split):
        (pairs if pair.outcome is Outcome.OK else refused).append(pair)
    if not pairs:
        raise Refusals.of(refused).nothing_usable(source, "pair")
    if take is not None:
        ranks = _ranks([content_hash([pair.prompt.id, pair.chosen.text, pair.rejected.text]) for pair in pairs], seed)
        pairs = [pairs[index] for index in sorted(ranks[:take])]
    return PairRows(pairs, refused)


def each_pair(source: str | Path, *, split: str | None = None) -> Iterator[Pair]:
    """Every row of a source, one by one, in the data's order: as a pair, or refused as in `PairRows`."""
    for row in read(source, split):
        yield _pair_or_refusal(row)


def checked(pair: Pair) -> Pair:
    """A pair as it is, or refused by name where its prompt or an answer is missing or its answers are the same."""
    try:
        layouts.check_prompt(pair.prompt)
        layouts.check_answers(pair)
    except Refused as reason:
        return replace(pair, outcome=reason.outcome, detail=str(reason))
    return pair


def stream_pairs(source: str | Path, refused: Refusals, *, split: str | None = None) -> Iterator[Pair]:
    """The pairs of a source one by one, its other rows counted in `refused`; DataError at the end if there is none."""
    any_pair = False
    for pair in each_pair(source, split=split):
        if pair.outcome is Outcome.OK:
            any_pair = True
            yield pair
        else:
            refused.add(pair.outcome, pair.detail)
    if not any_pair:
        raise refused.nothing_usable(source, "pair")


def read_training(source: str | Path, *, split: str | None = None) -> TrainingRows:
    """The pairs of a source or, where its rows are unpaired, its labelled answers."""
    pairs: list[Pair] = []
    answers: list[LabelledAnswer] = []
    refused: list[Pair] = []
    for row in read(source, split):
        found = _training_row_or_refusal(row)
        if isinstance(found, LabelledAnswer):
            answers.append(found)
        else:
            (pairs if found.outcome is Outcome.OK else refused).append(found)
    if pairs and answers:
        raise DataError(
            f"{source}: mixes {len(pairs)} pairs and {len(answers)} unpaired rows; train on one kind at a time"
        )
    if not pairs and not answers:
        raise Refusals.of(refused).nothing_usable(source, "pair or labelled answer")
    return TrainingRows(pairs or answers, refused)


def describe_refused(source: str | Path, refused: Sequence[Pair], kept: int) -> str:
    """One line for people about the rows of a source that were refused; there must be some."""
    return Refusals.of(refused).told(source, kept)


def read_rows(path: Path) -> list[Pair]:
    """Every row of a file that `write_pairs` wrote in its default layout, refused ones and their outcomes included."""
    pairs = []
    for row in read(path):
        try:
            pairs.append(layouts.own(row.readable()))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, Refused):
            raise DataError(
                f"{path}: {row.where} was not written by anchored; other people's data is read by train.data"
            ) from None
    return pairs


def _pair_or_refusal(row: Row) -> Pair:
    try:
        return layouts.pair(row.readable())
    except Refused as reason:
        return refusal(row, reason)


def _training_row_or_refusal(row: Row) -> Pair | LabelledAnswer:
    try:
        columns = row.readable()
        return layouts.labelled(columns) if layouts.is_unpaired(columns) else layouts.pair(columns)
    except Refused as reason:
        return refusal(row, reason)


def _ranks(contents: Sequence[str], seed: int) -> list[int]:
    """Indices in an order drawn from the seed and each content alone."""
    return sorted(range(len(contents)), key=lambda index: (content_hash([seed, contents[index]]), index))
