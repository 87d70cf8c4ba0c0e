"""Tasks of EleutherAI's lm-evaluation-harness (lm-eval) as benchmarks: its prompts, filters and scores, our intervals.

lm-eval runs in a thread of its own and asks the checkpoint's chat; likelihoods come from its own model class on the
checkpoint's weights. A view is a metric after a filter.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from anchored.errors import AnchoredError, EvaluationError, ReplyError
from anchored.evaluate import statistics
from anchored.evaluate.benchmark import (
    CUT,
    NO_ANSWER,
    Examinee,
    Examining,
    Grade,
    Graded,
    Item,
    Rows,
    Sample,
    View,
    as_read,
    question_hash,
)
from anchored.evaluate.harness_measures import Measured, has_a_score, item_id, measured, unusable
from anchored.evaluate.harness_tasks import load_tasks, quiet
from anchored.evaluate.settings import EvaluateSettings
from anchored.evaluate.statistics import Estimate
from anchored.llm.ask import ask_all
from anchored.llm.chat import Chat, Reply, Request
from anchored.progress import Progress
from anchored.records import Message, Prompt, content_hash, prompt_id
from anchored.runs import one_line, write_text

_SHOWN = 100


class Harness(Examining):
    """The benchmark that lm-eval knows by a name; of `limit` questions at most, from all of its tasks alike."""

    judge = None

    def __init__(self, name: str, evaluation: EvaluateSettings, limit: int | None, others: Sequence[str]) -> None:
        self._settings, self._seed, self._limit = evaluation.lm_eval, evaluation.seed, limit
        self._tasks = load_tasks(name, evaluation.lm_eval, others)
        self.name, self.version = name, self._tasks.version
        self.needs_weights = self._tasks.needs_weights
        if not has_a_score(self._tasks):
            why = "; ".join(f"{metric}: {reason}" for metric, reason in unusable(self._tasks).items())
            raise EvaluationError(
                f"evaluate.benchmarks: {name} has no score that is a mean of grades from 0 to 1 ({why}); measure it "
                "with lm-eval's own command"
            )
        self._items: dict[str, Item] = {}
        self._measured: dict[str, Measured] = {}
        self._results: dict[str, dict[str, Any]] = {}

    @property
    def views(self) -> tuple[View, ...]:  # type: ignore[override]
        """The metrics that every model so far has."""
        models = [one.measures for one in self._measured.values()]
        shared = [name for name in (models[0] if models else ()) if all(name in one for one in models)]
        return tuple(self._view(name) for name in shared)

    def items(self) -> Sequence[Item]:
        """The questions, which are known when a model has been asked them."""
        return tuple(self._items.values())

    def judged_by(self, judge: Chat | None, rows: Rows) -> str:
        return ""

    def notes(self, rows: Rows) -> Sequence[str]:
        notes = [f"{name} is left out: {reason}" for name, reason in self._left_out.items()]
        return [*notes, *filter(None, map(self._lacking, self.views))]

    def export(self, folder: Path, model: str, rows: Rows) -> None:
        """results.json: what lm-eval found, in all its metrics, as its own command has it."""
        from lm_eval.utils import handle_non_serializable

        text = json.dumps(self._results[model], indent=2, default=handle_non_serializable, ensure_ascii=False)
        folder.mkdir(exist_ok=True)
        write_text(folder / "results.json", text)

    @property
    def _left_out(self) -> dict[str, str]:
        """Metrics that are no views, and why."""
        return {name: reason for one in self._measured.values() for name, reason in one.left_out.items()}

    async def examine(self, model: Examinee, progress: Progress) -> list[Graded]:
        bridge = _Bridge(f"{self.name}: {model.name}", progress)
        asking = partial(
            _asking_model,
            partial(bridge.ask, model.chat),
            partial(bridge.ask, model.likelihoods),
            max_tokens=self._settings.max_tokens,
            seed=self._seed,
            folder=model.folder,
        )
        try:
            return await asyncio.to_thread(self._examine, model.name, asking)
        finally:
            bridge.end()

    def _examine(self, name: str, asking: Callable[[], Any]) -> list[Graded]:
        from lm_eval.evaluator import evaluate

        tasks = self._tasks
        counts = self._counts()
        chosen = {task: tasks.tasks[task] for task in counts}
        lm = asking()
        with quiet():
            tasks.seed()
            try:
                results: Any = evaluate(
                    lm,
                    {"tasks": chosen, "groups": {tasks.name: tasks.group} if tasks.group else {}},  # type: ignore[typeddict-item]
                    samples=None if self._limit is None else {task: list(range(n)) for task, n in counts.items()},
                    bootstrap_iters=0,
                    apply_chat_template=True,
                    fewshot_as_multiturn=True,
                    confirm_run_unsafe_code=self._settings.unsafe_code,
                )
            except AnchoredError:
                raise
            except Exception as error:  # a task's own code may raise anything
                raise EvaluationError(
                    f"{self.name}: {name}: lm-eval fails: {type(error).__name__}: {one_line(error)[:300]}"
                ) from error
        found = measured(tasks, results, complete=not lm.failures)
        self._measured[name] = found
        self._results[name] = {key: value for key, value in results.items() if key != "samples"}
        if not self.views:
            why = "; ".join(f"{metric}: {reason}" for metric, reason in self._left_out.items())
            raise EvaluationError(f"{self.name}: {name}: lm-eval found nothing that can be a score here ({why})")
        return [
            self._graded(task, place, samples, lm, found)
            for task in counts
            for place, samples in _by_question(results["samples"][task]).items()
        ]

    def _counts(self) -> dict[str, int]:
        """How many questions of each task are asked."""
        counts = {name: len(task.eval_docs) for name, task in self._tasks.tasks.items()}
        if self._limit is None:
            return counts
        taken, left = dict.fromkeys(counts, 0), self._limit
        while left and any(taken[name] < counts[name] for name in counts):
            for name in counts:
                if left and taken[name] < counts[name]:
                    taken[name], left = taken[name] + 1, left - 1
        return {name: count for name, count in taken.items() if count}

    def _graded(self, task: str, place: int, samples: Sequence[Mapping[str, Any]], lm: Any, found: Measured) -> Graded:
        name = item_id(self._tasks, task, place)
        item = self._items.setdefault(name, _item(name, task, samples[0]))
        if failure := lm.failures.get((task, place)):
            return Graded(item, None, Grade(None, failure, remarks=(NO_ANSWER,)))
        grades = {view: one.grades[name] for view, one in found.measures.items() if name in one.grades}
        answer, notes = _answer(samples)
        cut = lm.cut.get((task, place))
        if cut:
            notes = [f"finish_reason {cut}", *notes]
        return Graded(item, answer, Grade(grades or None, "; ".join(notes), remarks=(CUT,) if cut else ()))

    def _view(self, name: str) -> View:
        models = [one.measures[name] for one in self._measured.values()]
        lacking = frozenset(item for item in self._items if any(item not in one.grades for one in models))
        weights = {item: weight for item, weight in models[0].weights.items() if item not in lacking}
        if len(set(weights.values())) <= 1:
            return View(name, left_out=lacking)
        return View(name, left_out=lacking, estimator=partial(_weighted, name, weights))

    def _lacking(self, view: View) -> str:
        """What to say where questions would count for some models only."""
        if len({frozenset(one.measures[view.name].grades) for one in self._measured.values()}) == 1:
            return ""
        return f"{view.name} leaves out {len(view.left_out)} questions, on which lm-eval does not measure every model"


class _Bridge:
    """From lm-eval's thread, which blocks, to chats in the event loop."""

    def __init__(self, task: str, progress: Progress) -> None:
        self._task, self._progress = task, progress
        self._loop = asyncio.get_running_loop()
        self._pending: Future[list[Reply | ReplyError]] | None = None
        self._ended = False

    def ask(self, chat: Chat | None, requests: Sequence[Request]) -> list[Reply | ReplyError]:
        """All replies. Called in lm-eval's thread."""
        assert chat is not None, "what needs likelihoods is given them"
        if self._ended:
            raise asyncio.CancelledError
        self._pending = asyncio.run_coroutine_threadsafe(self._ask(chat, requests), self._loop)
        return self._pending.result()

    def end(self) -> None:
        """Nobody waits any more: the thread comes to its end at what it asks, or is about to ask."""
        self._ended = True
        if self._pending:
            self._pending.cancel()

    async def _ask(self, chat: Chat, requests: Sequence[Request]) -> list[Reply | ReplyError]:
        self._progress.start(self._task, len(requests))
        replies = await ask_all(chat, requests, on_reply=lambda _index, _reply: self._progress.advance(self._task))
        self._progress.finish(self._task)
        if all(isinstance(reply, ReplyError) for reply in replies):
            raise EvaluationError(
                f"{self._task}: no item got an answer; the first one: {replies[0]}; mend it and repeat the command"
            )
        return replies


def _asking_model(ask: Any, score: Any, *, max_tokens: int, seed: int, folder: str | Path | None) -> Any:
    from anchored.evaluate.harness_requests import AskingModel

    return AskingModel(
        ask, score, max_tokens=max_tokens, seed=seed, takes_system=folder is None or _takes_system(folder)
    )


def _takes_system(folder: str | Path) -> bool:
    """Whether a model's template takes a system message; lm-eval leaves it out where not."""
    from anchored.llm.model_folder import load_tokenizer

    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is water wet?"}]
    try:
        load_tokenizer(folder).apply_chat_template(turns, tokenize=False)
    except Exception:  # whatever a template's author raises, or jinja
        return False
    return True


def _by_question(samples: Sequence[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    """A task's samples by the question's number, one for each filter."""
    found: dict[int, list[Mapping[str, Any]]] = {}
    for sample in samples:
        found.setdefault(sample["doc_id"], []).append(sample)
    return found


def _item(name: str, task: str, sample: Mapping[str, Any]) -> Item:
    context = sample["arguments"][0][0]
    messages = tuple(Message(turn["role"], turn["content"]) for turn in json.loads(context)) if context else ()
    asked = content_hash([list(arguments) for arguments in sample["arguments"]])
    shown = _in_question(sample["doc"], as_read(messages[-1].content)) if messages else []
    about = (sample["doc_hash"], *([question_hash(*shown)] if shown else []))
    return Item(name, Prompt(messages, prompt_id(messages)), task, cluster=asked, about=about)


def _in_question(found: object, question: str) -> list[str]:
    """The texts of a document that its question holds, and so no more of an answer than the question does."""
    if isinstance(found, str):
        return [found] if found.strip() and as_read(found) in question else []
    parts = found.values() if isinstance(found, dict) else found if isinstance(found, list | tuple) else ()
    return [text for part in parts for text in _in_question(part, question)]


def _answer(samples: Sequence[Mapping[str, Any]]) -> tuple[str | None, list[str]]:
    """A question's answer, and what filters made of it or which ending is the likeliest."""
    replies = [repeats[0] for repeats in samples[0]["resps"]]
    if not isinstance(replies[0], str):
        likeliest = int(np.argmax([likelihood for likelihood, _ in replies]))
        return None, [f"likeliest: {samples[0]['arguments'][likeliest][1].strip()!r}"]
    made = {sample["filter"]: one_line(str(sample["filtered_resps"][0])) for sample in samples}
    return replies[0], [
        f"{name}: {text[:_SHOWN]}" for name, text in made.items() if text != one_line(replies[0]) and name != "none"
    ]


def _weighted(name: str, weights: Mapping[str, float], sample: Sample, resamples: int, seed: int) -> Estimate:
    """Weighted means of the models' grades, over draws of what is asked."""
    numbers = {asked: number for number, asked in enumerate(dict.fromkeys(item.asked for item in sample.items))}
    drawn = statistics.draws(len(numbers), resamples, seed)[:, [numbers[item.asked] for item in sample.graded]]
    weight = np.array([weights[item.id] for item in sample.graded])
    grades = np.array([[(rows[item.id].grades or {})[name] for item in sample.graded] for rows in sample.models])
    with np.errstate(invalid="ignore"):
        resampled = drawn @ (grades * weight).T / (drawn @ weight)[:, None]
    return Estimate(100 * (grades @ weight) / weight.sum(), 100 * resampled, len(numbers) > 1)
