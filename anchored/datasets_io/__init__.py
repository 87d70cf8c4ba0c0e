"""Reads preference data and prompts in the layouts that people have, and writes pairs in TRL's.

In: a file (.jsonl, .json, .parquet, .csv, each also .gz), a folder of such files, a run folder, or a Hub id (`rows`),
in any of the layouts of `layouts`. Out: frozen `Pair`s and `Prompt`s. A row that cannot be a pair is returned as
refused, with its outcome and with what is wrong in which line; only a source without any usable row is an error.
Nothing here compares, renders or scores texts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from anchored.datasets_io import layouts
from anchored.datasets_io.cells import Refused, well_formed
from anchored.datasets_io.rows import Row, read
from anchored.errors import DataError
from anchored.records import Answer, LabelledAnswer, Message, Outcome, Pair, Prompt, content_hash, prompt_id
from anchored.runs import one_line, written_aside

Layout = Literal["trl", "implicit", "clair32k"]
"""trl: prompt messages, assistant-only answers; implicit: full turns; clair32k: full turns beside a string prompt."""

_TEXT_COLUMNS = ("id", "prompt_id", "method", "rational", "chosen_model", "rejected_model", "outcome", "detail")


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


@dataclass(frozen=True, slots=True)
class PromptRows:
    """What was drawn from a source of prompts."""

    prompts: list[Prompt]
    held_out: list[Prompt]
    refused: list[Pair] = field(default_factory=list)
    """Rows without a usable prompt."""


def read_pairs(source: str | Path, *, take: int | None = None, seed: int = 0, split: str | None = None) -> PairRows:
    """The pairs of a source; with `take`, a uniform seeded sample of at most that many, in the data's order."""
    pairs, refused = [], []
    for pair in each_pair(source, split=split):
        (pairs if pair.outcome is Outcome.OK else refused).append(pair)
    if not pairs:
        raise DataError(nothing_usable(source, "pair", refused))
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
        raise DataError(nothing_usable(source, "pair or labelled answer", refused))
    return TrainingRows(pairs or answers, refused)


def read_prompts(
    source: str | Path, *, take: int | None = None, held_out: int | None = 0, seed: int = 0, split: str | None = None
) -> PromptRows:
    """The distinct prompts of a source: `held_out` of them apart (see `held_out_count`), at most `take` of the others.

    Both are uniform seeded samples. They are drawn by the rank of each prompt's content, so a smaller `take` is a part
    of a larger one, and neither the order of the rows nor a few more rows change who is drawn.
    """
    found: dict[str, Prompt] = {}
    refused = []
    for row in read(source, split, layouts.READ_FOR_PROMPTS):
        try:
            prompt = layouts.prompt(row.readable())
        except Refused as reason:
            refused.append(_refusal(row, reason))
        else:
            found.setdefault(prompt_id(prompt.messages), prompt)
    if not found:
        raise DataError(nothing_usable(source, "prompt", refused))
    prompts = _named(found)
    ranks = _ranks(list(found), seed)
    kept = len(ranks) - held_out_count(source, held_out, len(ranks))
    drawn, apart = sorted(ranks[:kept][:take]), sorted(ranks[kept:])
    return PromptRows([prompts[index] for index in drawn], [prompts[index] for index in apart], refused)


def held_out_count(source: str | Path, asked: int | None, prompts: int) -> int:
    """How many of `prompts` distinct prompts to hold out; None asks for 100, or for a tenth of fewer than 1000."""
    if asked is None:
        return min(100, prompts // 10)
    if asked >= prompts:
        raise DataError(
            f"{source}: has {prompts} distinct prompts, so {asked} cannot be held out; lower held_out or add more"
        )
    return asked


def describe_refused(source: str | Path, refused: Sequence[Pair], kept: int) -> str:
    """One line for people about the rows of a source that were refused; there must be some."""
    return f"{source}: {len(refused)} of {kept + len(refused)} rows refused {_reasons(refused)}"


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


def write_pairs(
    path: Path, pairs: Sequence[Pair], extra: Mapping[str, Sequence[Any]] | None = None, layout: Layout = "trl"
) -> None:
    """Write pairs as parquet or JSONL, by the ending of `path`; `extra` are further columns, one value per pair."""
    if layout not in get_args(Layout):
        raise DataError(f"layout {layout!r} is not known; choose from {', '.join(get_args(Layout))}")
    writers = {".parquet": _write_parquet, ".jsonl": _write_jsonl}
    if path.suffix not in writers:
        raise DataError(f"{path}: cannot tell the format from its ending; use {' or '.join(writers)}")
    columns = _columns(pairs, layout) | {name: list(values) for name, values in (extra or {}).items()}
    if any(pair.margin is not None for pair in pairs):
        columns["margin"] = [pair.margin for pair in pairs]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            writers[path.suffix](aside, columns)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({one_line(error)}); free space or choose another folder") from None


def _pair_or_refusal(row: Row) -> Pair:
    try:
        return layouts.pair(row.readable())
    except Refused as reason:
        return _refusal(row, reason)


def _training_row_or_refusal(row: Row) -> Pair | LabelledAnswer:
    try:
        columns = row.readable()
        return layouts.labelled(columns) if layouts.is_unpaired(columns) else layouts.pair(columns)
    except Refused as reason:
        return _refusal(row, reason)


def _refusal(row: Row, reason: Refused) -> Pair:
    prompt = Prompt((), layouts.own_id(row.columns) or content_hash(row.where)[:16])
    return Pair(prompt, Answer(""), Answer(""), outcome=reason.outcome, detail=f"{row.where}: {reason}")


def nothing_usable(source: str | Path, thing: str, refused: Sequence[Pair]) -> str:
    """Why a source is an error: it has no `thing`; all its rows are in `refused`."""
    if not refused:
        return f"{source}: is empty; it needs at least one {thing}"
    return f"{source}: none of its {len(refused)} rows is a {thing} {_reasons(refused)}"


def _reasons(refused: Sequence[Pair]) -> str:
    counts = Counter(pair.outcome for pair in refused).most_common()
    why = ", ".join(f"{count} {outcome}" for outcome, count in counts)
    return f"({why}); the first: {refused[0].detail}"


def _named(found: Mapping[str, Prompt]) -> list[Prompt]:
    """The data's own ids where they tell all prompts apart, else ids by content for all of them."""
    prompts = list(found.values())
    if len({prompt.id for prompt in prompts}) == len(prompts):
        return prompts
    return [replace(prompt, id=content) for content, prompt in found.items()]


def _ranks(contents: Sequence[str], seed: int) -> list[int]:
    """Indices in an order drawn from the seed and each content alone."""
    return sorted(range(len(contents)), key=lambda index: (content_hash([seed, contents[index]]), index))


def _columns(pairs: Sequence[Pair], layout: Layout) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    if layout == "trl":
        columns["prompt"] = [_as_dicts(pair.prompt.messages) for pair in pairs]
    elif layout == "clair32k":
        columns["prompt"] = [well_formed(pair.prompt.messages[-1].content) for pair in pairs]
    for name in ("chosen", "rejected"):
        columns[name] = [_answer_turns(pair, getattr(pair, name), layout) for pair in pairs]
    about = [
        (
            pair.prompt.id,
            prompt_id(pair.prompt.messages),
            pair.method,
            pair.rational,
            pair.chosen.model,
            pair.rejected.model,
            str(pair.outcome),
            pair.detail,
        )
        for pair in pairs
    ]
    return columns | {name: [well_formed(row[place]) for row in about] for place, name in enumerate(_TEXT_COLUMNS)}


def _answer_turns(pair: Pair, answer: Answer, layout: Layout) -> list[dict[str, str]]:
    before = () if layout == "trl" else pair.prompt.messages
    return _as_dicts((*before, Message("assistant", answer.text)))


def _as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": well_formed(message.content)} for message in messages]


def _write_parquet(path: Path, columns: Mapping[str, list[Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    text = pyarrow.string()
    turns = pyarrow.list_(pyarrow.struct([("role", text), ("content", text)]))
    strings = columns.get("prompt", [])[:1] and isinstance(columns["prompt"][0], str)
    types = {"prompt": text if strings else turns, "chosen": turns, "rejected": turns} | dict.fromkeys(
        _TEXT_COLUMNS, text
    )
    arrays = {name: pyarrow.array(values, types.get(name)) for name, values in columns.items()}
    pyarrow.parquet.write_table(pyarrow.table(arrays), path)


def _write_jsonl(path: Path, columns: Mapping[str, list[Any]]) -> None:
    with open(path, "w", encoding="utf-8") as handle:
        for values in zip(*columns.values(), strict=True):
            handle.write(json.dumps(dict(zip(columns, values, strict=True)), ensure_ascii=False) + "\n")
