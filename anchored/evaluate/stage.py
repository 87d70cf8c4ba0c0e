"""The evaluate stage: checkpoints and benchmarks in; answers, scores.jsonl and improvements out.

Replies come from chats that the store stands before, so an evaluation that was cut short asks only what is missing,
and a model whose replies are all known is not even loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anchored.errors import EvaluationError, ReplyError
from anchored.evaluate import statistics
from anchored.evaluate.benchmark import Benchmark, Item
from anchored.evaluate.settings import EvaluateSettings
from anchored.llm.ask import ask_all
from anchored.llm.chat import Chat, Reply, Request
from anchored.progress import Progress
from anchored.records import Score
from anchored.runs import Run, write_lines


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model to evaluate: the starting model (`start`, step 0) or a checkpoint of the run."""

    name: str
    step: int
    folder: str | Path


@dataclass(frozen=True, slots=True)
class Graded:
    """One item with a checkpoint's answer and its grades, by view; an answer that could not be had is not graded."""

    item: Item
    answer: str
    grades: dict[str, float] | None
    note: str = ""


async def evaluate(
    run: Run,
    settings: EvaluateSettings,
    benchmarks: Sequence[Benchmark],
    checkpoints: Sequence[Checkpoint],
    open_chat: Callable[[Checkpoint], Chat],
    progress: Progress,
) -> dict[str, Any]:
    """Score every checkpoint on every benchmark; `checkpoints` begins with the starting model.

    Writes answers/BENCHMARK/CHECKPOINT.jsonl, scores.jsonl and the stage's summary, which holds the improvements.
    """
    began = time.monotonic()
    check_names(benchmarks)
    graded: dict[tuple[str, str], list[Graded]] = {}
    for checkpoint in checkpoints:
        chat = open_chat(checkpoint)
        try:
            for benchmark in benchmarks:
                rows = await _answer(chat, benchmark, checkpoint, settings, progress)
                _write_answers(run, benchmark, checkpoint, rows)
                graded[benchmark.name, checkpoint.name] = rows
        finally:
            await chat.close()
    scores = [
        score
        for benchmark in benchmarks
        for checkpoint in checkpoints
        for score in _scores(benchmark, checkpoint, graded[benchmark.name, checkpoint.name], settings)
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
) -> list[Graded]:
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
    rows = [_graded(benchmark, item, reply) for item, reply in zip(items, replies, strict=True)]
    if all(row.grades is None for row in rows):
        raise EvaluationError(f"{task}: no item got an answer; the first one: {rows[0].note}")
    return rows


def _graded(benchmark: Benchmark, item: Item, reply: Reply | ReplyError) -> Graded:
    if isinstance(reply, ReplyError):
        return Graded(item, "", None, str(reply))
    note = "" if reply.finish_reason == "stop" else f"finish_reason {reply.finish_reason}"
    return Graded(item, reply.text, benchmark.grade(item, reply.text), note)


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
                "note": row.note,
            }
            for row in rows
        ),
    )


def _categories(benchmark: Benchmark) -> list[str | None]:
    found = sorted({item.category for item in benchmark.items()})
    return [None, *found] if len(found) > 1 else [None]


def _scores(
    benchmark: Benchmark, checkpoint: Checkpoint, rows: Sequence[Graded], settings: EvaluateSettings
) -> list[Score]:
    scores = []
    for view in benchmark.views:
        for category in _categories(benchmark):
            grades = [row.grades[view] for row in rows if row.grades and category in (None, row.item.category)]
            if not grades:
                continue
            interval = statistics.score(np.array(grades), settings.resamples, settings.seed)
            scores.append(
                Score(
                    checkpoint=checkpoint.name,
                    step=checkpoint.step,
                    benchmark=benchmark.name,
                    version=benchmark.version,
                    view=view,
                    category=category,
                    score=interval.value,
                    low=interval.low,
                    high=interval.high,
                    n=len(grades),
                    judge="",
                )
            )
    return scores


def _improvements(
    benchmark: Benchmark,
    checkpoints: Sequence[Checkpoint],
    graded: Sequence[Sequence[Graded]],
    settings: EvaluateSettings,
) -> list[dict[str, Any]]:
    """One row per view and category, over the items that every checkpoint answered."""
    if len(checkpoints) < 2:
        return []
    items = [column for column in zip(*graded, strict=True) if all(row.grades for row in column)]
    rows = []
    for view in benchmark.views:
        for category in _categories(benchmark):
            columns = [
                [row.grades[view] for row in column if row.grades]
                for column in items
                if category in (None, column[0].item.category)
            ]
            if not columns:
                continue
            grades = np.array(columns).T
            gain = statistics.improvement(grades[0], grades[1:], settings.resamples, settings.seed)
            rows.append(
                {
                    "benchmark": benchmark.name,
                    "view": view,
                    "category": category,
                    "n": len(columns),
                    **asdict(gain),
                    "max_checkpoint": checkpoints[1 + gain.max_checkpoint].name,
                }
            )
    return rows
