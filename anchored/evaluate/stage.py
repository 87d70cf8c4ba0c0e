"""The evaluate stage: checkpoints, benchmarks and a judge in; answers, verdicts, scores.jsonl and improvements out.

Replies come from chats that the store stands before, so an evaluation that was cut short asks only what is missing,
and a model whose replies are all known is not even loaded.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from anchored.errors import EvaluationError, ReplyError
from anchored.evaluate import statistics
from anchored.evaluate.benchmark import Answered, Benchmark, Grade, Item, View
from anchored.evaluate.settings import EvaluateSettings
from anchored.llm.ask import ask_all
from anchored.llm.chat import Chat, Reply, Request
from anchored.progress import Progress
from anchored.records import Score
from anchored.runs import Run, write_lines

NO_ANSWER = "without an answer"
CUT = "cut short"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model to evaluate: the starting model (`start`, step 0) or a checkpoint of the run."""

    name: str
    step: int
    folder: str | Path


@dataclass(frozen=True, slots=True)
class Graded:
    """One item with a checkpoint's answer and its grade; an answer that could not be had has no grades."""

    item: Item
    answer: str
    grade: Grade

    @property
    def grades(self) -> dict[str, float] | None:
        return self.grade.grades


async def evaluate(
    run: Run,
    settings: EvaluateSettings,
    benchmarks: Sequence[Benchmark],
    checkpoints: Sequence[Checkpoint],
    open_chat: Callable[[Checkpoint], Chat],
    progress: Progress,
    judge: Chat | None = None,
) -> dict[str, Any]:
    """Score every checkpoint on every benchmark; `checkpoints` begins with the starting model.

    Each checkpoint is opened once and answers all benchmarks; `judge`, which those that need one are given, grades its
    answers while the next one answers. Writes answers/BENCHMARK/CHECKPOINT.jsonl, scores.jsonl and the stage's summary,
    which holds the improvements.
    """
    began = time.monotonic()
    check_names(benchmarks)
    graded: dict[tuple[str, str], list[Graded]] = {}

    async def grade(checkpoint: Checkpoint, answered: Sequence[Sequence[Reply | ReplyError]]) -> None:
        for benchmark, replies in zip(benchmarks, answered, strict=True):
            rows = await _grade(benchmark, checkpoint, replies, judge, progress)
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
                answered = [await _answer(chat, benchmark, checkpoint, settings, progress) for benchmark in benchmarks]
            finally:
                await chat.close()
            grading.append(asyncio.create_task(grade(checkpoint, answered)))
        await asyncio.gather(*grading)
    finally:
        for task in grading:
            task.cancel()
        await asyncio.gather(*grading, return_exceptions=True)
    scores = [
        score
        for benchmark in benchmarks
        for checkpoint in checkpoints
        for score in _scores(benchmark, checkpoint, graded[benchmark.name, checkpoint.name], judge, settings)
    ]
    write_lines(run.scores, map(asdict, scores))
    summary = {
        "checkpoints": [checkpoint.name for checkpoint in checkpoints],
        "improvement": [
            row
            for benchmark in benchmarks
            for row in _improvements(
                benchmark, checkpoints, [graded[benchmark.name, c.name] for c in checkpoints], settings
            )
        ],
        "ungraded": sum(row.grades is None for rows in graded.values() for row in rows),
        "remarks": _remarks(benchmarks, checkpoints, graded),
        "seconds": round(time.monotonic() - began, 1),
    }
    run.complete("evaluate", summary)
    return summary


def check_names(benchmarks: Sequence[Benchmark]) -> None:
    """Raise EvaluationError where two benchmarks have one name."""
    names = [benchmark.name for benchmark in benchmarks]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise EvaluationError(
            f"evaluate.benchmarks: two are named {twice!r}, and answers and scores are kept by name; rename a file"
        )


async def _answer(
    chat: Chat, benchmark: Benchmark, checkpoint: Checkpoint, settings: EvaluateSettings, progress: Progress
) -> list[Reply | ReplyError]:
    items = benchmark.items()
    task = f"{benchmark.name}: {checkpoint.name}"
    sample = settings.sample
    requests = [
        Request(item.prompt.messages, sample.temperature, sample.top_p, sample.max_tokens, seed=settings.seed)
        for item in items
    ]
    progress.start(task, len(items))
    replies = await ask_all(chat, requests, on_reply=lambda _index, _reply: progress.advance(task))
    progress.finish(task)
    if all(isinstance(reply, ReplyError) for reply in replies):
        raise EvaluationError(f"{task}: no item got an answer; the first one: {replies[0]}")
    return replies


async def _grade(
    benchmark: Benchmark,
    checkpoint: Checkpoint,
    replies: Sequence[Reply | ReplyError],
    judge: Chat | None,
    progress: Progress,
) -> list[Graded]:
    items = benchmark.items()
    answers = [
        Answered(item, reply.text) for item, reply in zip(items, replies, strict=True) if isinstance(reply, Reply)
    ]
    task = f"{benchmark.name}: {checkpoint.name}, judged"
    if benchmark.needs_judge:
        progress.start(task, len(answers))
    grades = iter(
        await benchmark.grade_all(
            answers, judge, (lambda: progress.advance(task)) if benchmark.needs_judge else (lambda: None)
        )
    )
    rows = [_graded(item, reply, grades) for item, reply in zip(items, replies, strict=True)]
    if benchmark.needs_judge:
        progress.finish(task)
    if seen := _count_remarks(rows):
        counts = ", ".join(f"{count:,} {remark}" for remark, count in seen.items())
        progress.note(f"{benchmark.name}: {checkpoint.name}: of {len(rows):,} items {counts}")
    return rows


def _graded(item: Item, reply: Reply | ReplyError, grades: Iterator[Grade]) -> Graded:
    if isinstance(reply, ReplyError):
        return Graded(item, "", Grade(None, str(reply), remarks=(NO_ANSWER,)))
    grade = next(grades)
    if reply.finish_reason != "stop":
        note = "; ".join(filter(None, (f"finish_reason {reply.finish_reason}", grade.note)))
        grade = replace(grade, note=note, remarks=(*grade.remarks, CUT))
    return Graded(item, reply.text, grade)


def _count_remarks(rows: Sequence[Graded]) -> Counter[str]:
    return Counter(remark for row in rows for remark in row.grade.remarks)


def _remarks(
    benchmarks: Sequence[Benchmark],
    checkpoints: Sequence[Checkpoint],
    graded: Mapping[tuple[str, str], Sequence[Graded]],
) -> dict[str, dict[str, dict[str, int]]]:
    """How many answers of each benchmark and checkpoint have each remark, where there is any."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for benchmark in benchmarks:
        for checkpoint in checkpoints:
            if counts := _count_remarks(graded[benchmark.name, checkpoint.name]):
                found.setdefault(benchmark.name, {})[checkpoint.name] = dict(counts)
    return found


def _write_answers(run: Run, benchmark: Benchmark, checkpoint: Checkpoint, rows: Sequence[Graded]) -> None:
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
            for row in rows
        ),
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """What one score is of: a benchmark in one view, as a whole or one category of it."""

    view: View
    category: str | None
    items: Sequence[Item]

    def design(self, graded: Sequence[Item]) -> statistics.Design:
        """How those of the items hang together that have grades; strata weigh what they weigh with all of them."""
        return statistics.design(
            [item.cluster or item.id for item in graded],
            [item.stratum for item in graded],
            Counter(item.stratum for item in self.items),
            self.view.decimals,
        )


def _parts(benchmark: Benchmark) -> Iterator[_Part]:
    for view in benchmark.views:
        items = [item for item in benchmark.items() if item.id not in view.left_out]
        yield _Part(view, None, items)
        named = [item for item in items if item.id not in view.only_in_whole]
        categories = sorted({item.category for item in named})
        if len(categories) > 1:
            for category in categories:
                yield _Part(view, category, [item for item in named if item.category == category])


def _scores(
    benchmark: Benchmark,
    checkpoint: Checkpoint,
    rows: Sequence[Graded],
    judge: Chat | None,
    settings: EvaluateSettings,
) -> list[Score]:
    grades = {row.item.id: row.grades for row in rows if row.grades}
    scores = []
    for part in _parts(benchmark):
        items = [item for item in part.items if item.id in grades]
        if not items:
            continue
        interval = statistics.score(
            np.array([grades[item.id][part.view.name] for item in items]),
            settings.resamples,
            settings.seed,
            part.design(items),
        )
        scores.append(
            Score(
                checkpoint=checkpoint.name,
                step=checkpoint.step,
                benchmark=benchmark.name,
                version=benchmark.version,
                view=part.view.name,
                category=part.category,
                score=interval.value,
                low=interval.low,
                high=interval.high,
                n=len(items),
                judge=benchmark.judged_by(judge),
            )
        )
    return scores


def _improvements(
    benchmark: Benchmark,
    checkpoints: Sequence[Checkpoint],
    graded: Sequence[Sequence[Graded]],
    settings: EvaluateSettings,
) -> list[dict[str, Any]]:
    """One row per view and category, over the items for which every checkpoint has a grade."""
    if len(checkpoints) < 2:
        return []
    grades = [{row.item.id: row.grades for row in rows if row.grades} for rows in graded]
    rows = []
    for part in _parts(benchmark):
        items = [item for item in part.items if all(item.id in one for one in grades)]
        if not items:
            continue
        table = np.array([[one[item.id][part.view.name] for item in items] for one in grades])
        gain = statistics.improvement(table[0], table[1:], settings.resamples, settings.seed, part.design(items))
        rows.append(
            {
                "benchmark": benchmark.name,
                "view": part.view.name,
                "category": part.category,
                "n": len(items),
                **asdict(gain),
                "max_checkpoint": checkpoints[1 + gain.max_checkpoint].name,
            }
        )
    return rows
