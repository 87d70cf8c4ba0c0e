"""The evaluate stage: checkpoints, benchmarks and a judge in; answers, verdicts, scores.jsonl and improvements out.

Replies come from chats that the store stands before, so an evaluation that was cut short asks only what is missing,
and a model whose replies are all known is not even loaded.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from anchored.errors import EvaluationError, ReplyError
from anchored.evaluate.benchmark import (
    CUT,
    NO_ANSWER,
    Answered,
    Benchmark,
    Examinee,
    Examining,
    Grade,
    Graded,
    Item,
    Rows,
)
from anchored.evaluate.scoring import Models, Resampling, Scoring, mean_length
from anchored.evaluate.settings import EvaluateSettings
from anchored.llm.ask import ask_all
from anchored.llm.chat import Chat, Reply
from anchored.llm.money import Money, dollars
from anchored.llm.settings import Sampling
from anchored.progress import Progress
from anchored.records import STRONGER, Score
from anchored.runs import Run, write_lines, written_aside


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model to evaluate: the starting model (`start`, step 0) or a checkpoint of the run."""

    name: str
    step: int
    folder: str | Path


async def evaluate(
    run: Run,
    settings: EvaluateSettings,
    benchmarks: Sequence[Benchmark],
    checkpoints: Sequence[Checkpoint],
    open_chat: Callable[[Checkpoint], Chat],
    progress: Progress,
    judges: Mapping[str, Chat],
    money: Money | None = None,
    open_likelihoods: Callable[[Checkpoint], Chat] | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Score every checkpoint on every benchmark, the starting model first, then those of training in order.

    One named `STRONGER`, wherever it stands, is the model that the others are measured against. Each is opened once and
    answers all benchmarks; the benchmark's judge in `judges`, if it has one, grades its answers while the next one
    answers. `open_likelihoods` opens what tells likelihoods under a checkpoint's weights to benchmarks that need them.
    `limit` says of how many questions the benchmarks were made, for the summary.
    Writes answers/BENCHMARK/CHECKPOINT.jsonl, scores.jsonl, resamples.npz and the stage's summary.
    """
    began = time.monotonic()
    check_benchmarks(benchmarks, settings)
    graded: dict[tuple[str, str], dict[str, Graded]] = {}

    async def grade(checkpoint: Checkpoint, examined: Mapping[str, list[Graded]], answered: _Answers) -> None:
        for benchmark in benchmarks:
            if (found := examined.get(benchmark.name)) is None:
                found = await _grade(benchmark, checkpoint, answered[benchmark.name], judges, progress)
            rows = {row.item.id: row for row in found}
            _note_remarks(benchmark, checkpoint, rows, progress)
            _write_answers(run, benchmark, checkpoint, rows)
            graded[benchmark.name, checkpoint.name] = rows

    grading: list[asyncio.Task[None]] = []
    try:
        for checkpoint in checkpoints:
            for task in grading:
                if task.done():  # a judge that is down ends this before another model is loaded
                    task.result()
            chat = open_chat(checkpoint)
            try:
                examined = await _examine(chat, open_likelihoods, benchmarks, checkpoint, progress)
                answered = {
                    one.name: await _answer(chat, one, checkpoint, settings, progress)
                    for one in benchmarks
                    if one.name not in examined
                }
            finally:
                await chat.close()
            grading.append(asyncio.create_task(grade(checkpoint, examined, answered)))
        await asyncio.gather(*grading)
    finally:
        for task in grading:
            task.cancel()
        await asyncio.gather(*grading, return_exceptions=True)
    summary = _conclude(run, settings, benchmarks, checkpoints, graded, judges, progress)
    if money is not None:
        summary["spent"] = asdict(money.spent())
        progress.note(f"evaluate: {dollars(money.spent_usd)} are spent on judges and the stronger model")
    summary["limit"] = limit
    summary["seconds"] = round(time.monotonic() - began, 1)
    run.complete("evaluate", summary)
    return summary


def check_benchmarks(benchmarks: Sequence[Benchmark], settings: EvaluateSettings) -> None:
    """Raise EvaluationError where two benchmarks have one name, or none has the name that chooses checkpoints."""
    names = [benchmark.name for benchmark in benchmarks]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise EvaluationError(
            f"evaluate.benchmarks: two are named {twice!r}, and answers and scores are kept by name; rename a file"
        )
    if settings.select.on is not None and settings.select.on not in names:
        raise EvaluationError(
            f"evaluate.select.on: {settings.select.on!r} is none of the benchmarks, which are {', '.join(names)}"
        )


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a model replied to an item, or why it did not."""

    item: Item
    reply: Reply | ReplyError


_Answers = Mapping[str, Sequence[_Answer]]
"""By the benchmark's name."""


async def _examine(
    chat: Chat,
    open_likelihoods: Callable[[Checkpoint], Chat] | None,
    benchmarks: Sequence[Benchmark],
    checkpoint: Checkpoint,
    progress: Progress,
) -> dict[str, list[Graded]]:
    """What the benchmarks find that ask in their own way, by their names."""
    examining = [one for one in benchmarks if isinstance(one, Examining)]
    folder = None if checkpoint.name == STRONGER else checkpoint.folder
    found = {}
    if needing := [one for one in examining if one.needs_weights]:
        assert open_likelihoods is not None, "what needs likelihoods is given them"
        likelihoods = open_likelihoods(checkpoint)
        try:  # first, for the chat has not loaded its own weights yet
            model = Examinee(checkpoint.name, folder, chat, likelihoods)
            found = {one.name: await one.examine(model, progress) for one in needing}
        finally:
            await likelihoods.close()
    model = Examinee(checkpoint.name, folder, chat, None)
    return {**found, **{one.name: await one.examine(model, progress) for one in examining if one.name not in found}}


async def _answer(
    chat: Chat, benchmark: Benchmark, checkpoint: Checkpoint, settings: EvaluateSettings, progress: Progress
) -> list[_Answer]:
    task = f"{benchmark.name}: {checkpoint.name}"
    sample = (settings.stronger if checkpoint.name == STRONGER else None) or settings.sample
    answers = await _ask(chat, benchmark.items(), task, sample, settings.seed, progress)
    if all(isinstance(answer.reply, ReplyError) for answer in answers):
        raise EvaluationError(
            f"{task}: no item got an answer; the first one: {answers[0].reply}; mend it and repeat the command"
        )
    if more := benchmark.more_items(_answered(answers)):
        answers += await _ask(chat, more, f"{task}, asked again", sample, settings.seed, progress)
    return answers


async def _ask(
    chat: Chat, items: Sequence[Item], task: str, sample: Sampling, seed: int, progress: Progress
) -> list[_Answer]:
    requests = [sample.request(item.prompt.messages, seed=seed) for item in items]
    progress.start(task, len(items))
    replies = await ask_all(chat, requests, on_reply=lambda _index, _reply: progress.advance(task))
    progress.finish(task)
    return [_Answer(item, reply) for item, reply in zip(items, replies, strict=True)]


def _answered(answers: Sequence[_Answer]) -> list[Answered]:
    return [Answered(one.item, one.reply.text) for one in answers if isinstance(one.reply, Reply)]


async def _grade(
    benchmark: Benchmark,
    checkpoint: Checkpoint,
    answers: Sequence[_Answer],
    judges: Mapping[str, Chat],
    progress: Progress,
) -> list[Graded]:
    answered, judge = _answered(answers), judges.get(benchmark.name)
    task = f"{benchmark.name}: {checkpoint.name}, judged"
    if judge:
        progress.start(task, len(answered))
    grades = iter(
        await benchmark.grade_all(answered, judge, (lambda: progress.advance(task)) if judge else (lambda: None))
    )
    rows = [_graded(one, grades) for one in answers]
    if judge:
        progress.finish(task)
    return rows


def _note_remarks(benchmark: Benchmark, checkpoint: Checkpoint, rows: Rows, progress: Progress) -> None:
    if seen := _count_remarks(rows):
        counts = ", ".join(f"{count:,} {remark}" for remark, count in seen.items())
        progress.note(f"{benchmark.name}: {checkpoint.name}: of {len(rows):,} items {counts}")


def _graded(answer: _Answer, grades: Iterator[Grade]) -> Graded:
    item, reply = answer.item, answer.reply
    if isinstance(reply, ReplyError):
        return Graded(item, None, Grade(None, str(reply), remarks=(NO_ANSWER,)))
    grade = next(grades)
    if reply.finish_reason != "stop":
        note = "; ".join(filter(None, (f"finish_reason {reply.finish_reason}", grade.note)))
        grade = replace(grade, note=note, remarks=(*grade.remarks, CUT))
    return Graded(item, reply.text, grade)


def _count_remarks(rows: Rows) -> Counter[str]:
    return Counter(remark for row in rows.values() for remark in row.grade.remarks)


def _write_answers(run: Run, benchmark: Benchmark, checkpoint: Checkpoint, rows: Rows) -> None:
    folder = run.answers / benchmark.name
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(
        folder / f"{checkpoint.name}.jsonl",
        (
            {
                "id": row.item.id,
                "category": row.item.category,
                "prompt": [asdict(message) for message in row.item.prompt.messages],
                "answer": row.answer,
                "grades": row.grades,
                "note": row.grade.note,
                **({"judgement": row.grade.judgement} if row.grade.judgement else {}),
            }
            for row in rows.values()
        ),
    )
    benchmark.export(folder / checkpoint.name, checkpoint.name, rows)


def _conclude(
    run: Run,
    settings: EvaluateSettings,
    benchmarks: Sequence[Benchmark],
    checkpoints: Sequence[Checkpoint],
    graded: Mapping[tuple[str, str], Rows],
    judges: Mapping[str, Chat],
    progress: Progress,
) -> dict[str, Any]:
    """All numbers from all grades: scores.jsonl, resamples.npz, and the summary that is returned."""
    own = [checkpoint for checkpoint in checkpoints if checkpoint.name != STRONGER]
    stronger = [checkpoint for checkpoint in checkpoints if checkpoint.name == STRONGER]
    in_order = [*own, *stronger]
    how = Resampling(settings.resamples, settings.seed)
    scorings = {
        one.name: Scoring(one, _models(own, stronger, {c.name: graded[one.name, c.name] for c in in_order}), how)
        for one in benchmarks
    }
    chooses = scorings[settings.select.on or benchmarks[0].name]
    every = list(scorings.values())
    scores = [score for one in every for score in _scores(one, in_order, judges.get(one.benchmark.name))]
    write_lines(run.scores, map(asdict, scores))
    _write_resamples(run, every, own)

    nothing = (None, [], {})

    def told(what: Callable[[Benchmark, Rows], Any]) -> dict[str, dict[str, Any]]:
        names = [checkpoint.name for checkpoint in in_order]
        return {
            one.name: {name: value for name in names if (value := what(one, graded[one.name, name])) not in nothing}
            for one in benchmarks
        }

    notes = told(lambda benchmark, rows: list(benchmark.notes(rows)))
    chosen = [row for one in every if one is not chooses for row in one.chosen_elsewhere(chooses, settings.select.take)]
    failures = {name: one.failures for name, one in scorings.items()}
    _tell(notes, failures, len(in_order), progress)
    return {
        "checkpoints": [checkpoint.name for checkpoint in in_order],
        "improvement": [row for one in every for row in one.improvements()],
        "chosen": chosen,
        "stronger": [row for one in every for row in one.towards_stronger(str(stronger[0].folder))] if stronger else [],
        "lengths": told(mean_length),
        "length_changes": {name: one.length_changes() for name, one in scorings.items()},
        "ungraded": sum(row.grades is None for rows in graded.values() for row in rows.values()),
        "remarks": told(lambda _, rows: dict(_count_remarks(rows))),
        "notes": notes,
        "not_scored": failures,
    }


def _models(own: Sequence[Checkpoint], stronger: Sequence[Checkpoint], rows: Mapping[str, Rows]) -> Models:
    trained = tuple(checkpoint.name for checkpoint in own[1:])
    return Models(
        trained,
        rows[own[0].name],
        tuple(rows[name] for name in trained),
        rows[stronger[0].name] if stronger else None,
    )


def _tell(
    notes: Mapping[str, Mapping[str, Sequence[str]]],
    failures: Mapping[str, Sequence[str]],
    models: int,
    progress: Progress,
) -> None:
    """Say what is to be known before the scores are trusted: once, with the checkpoints that it holds of."""
    for benchmark, by_checkpoint in notes.items():
        for note in dict.fromkeys(note for those in by_checkpoint.values() for note in those):
            named = [checkpoint for checkpoint, those in by_checkpoint.items() if note in those]
            of = f"{', '.join(named)}: " if len(named) < models else ""
            progress.note(f"{benchmark}: {of}{note}")
    for benchmark, those in failures.items():
        for failure in those:
            progress.note(f"{benchmark}: {failure}")


def _scores(scoring: Scoring, checkpoints: Sequence[Checkpoint], judge: Chat | None) -> Iterator[Score]:
    benchmark = scoring.benchmark
    for place, (checkpoint, rows) in enumerate(zip(checkpoints, scoring.all, strict=True)):
        for part in scoring.parts:
            if found := scoring.score(part, place):
                interval, n = found
                yield Score(
                    checkpoint=checkpoint.name,
                    step=checkpoint.step,
                    benchmark=benchmark.name,
                    version=benchmark.version,
                    view=part.view.name,
                    category=part.category,
                    score=interval.value,
                    low=interval.low,
                    high=interval.high,
                    n=n,
                    judge=benchmark.judged_by(judge, rows),
                )


def _write_resamples(run: Run, scorings: Sequence[Scoring], checkpoints: Sequence[Checkpoint]) -> None:
    """What comparisons of runs are paired by: each whole score of each checkpoint in each resample."""
    arrays: dict[str, np.ndarray] = {}
    draws: dict[str, str] = {}
    for one in scorings:
        for view, (name, resampled) in one.resamples().items():
            arrays[f"{one.benchmark.name}\t{view}"] = resampled.astype(np.float32)
            draws[f"{one.benchmark.name}\t{view}"] = name
    meta = {"checkpoints": [checkpoint.name for checkpoint in checkpoints], "draws": draws}
    with written_aside(run.resamples) as aside, open(aside, "wb") as handle:
        np.savez_compressed(handle, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays)  # pyright: ignore[reportArgumentType]
