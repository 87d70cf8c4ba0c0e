"""AlpacaEval 2.0 as a benchmark: answers against the baseline's, the win rate and the length-controlled one.

A grade is the judge's preference, 0 (the baseline's answer) to 1 (the model's). The length-controlled rate is no mean
of them: a model of what length does is fitted to all answers, anew in every resample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from anchored.errors import EvaluationError
from anchored.evaluate import statistics
from anchored.evaluate.alpaca_files import (
    DIFFICULTY,
    SOURCE,
    Annotation,
    Instruction,
    Outputs,
    read_data,
    write_annotations,
    write_leaderboard,
    write_outputs,
)
from anchored.evaluate.alpaca_judge import SAME, Frame, Verdict, annotation, raw_completion, remarks, repeated
from anchored.evaluate.alpaca_score import at_length, leaderboard_row, length_controlled_rates, overlap_of, score
from anchored.evaluate.benchmark import NO_VERDICT, Answered, Benchmark, Grade, Graded, Item, Rows, Sample, View
from anchored.evaluate.judging import check_failures, grader
from anchored.evaluate.length_control import JudgedRows
from anchored.evaluate.preference import TIE
from anchored.evaluate.settings import EvaluateSettings
from anchored.evaluate.statistics import Estimate
from anchored.llm.ask import work_through
from anchored.llm.chat import Chat
from anchored.records import user_prompt

NAME = "alpaca-eval"
LENGTH_CONTROLLED, WIN_RATE, DISCRETE = "length-controlled", "win-rate", "discrete"
_AGAIN = " again"


class AlpacaEval(Benchmark):
    """The benchmark of a folder's files."""

    name = NAME

    def __init__(self, evaluation: EvaluateSettings) -> None:
        settings = evaluation.alpaca
        self.judge = self._judge = grader(NAME, settings.judge or evaluation.judge)
        if settings.data is None:
            raise EvaluationError(
                f"evaluate.alpaca.data: say in which folder {NAME}'s files are; they are yours to get, from {SOURCE}"
            )
        self._data = read_data(settings.data)
        self._controls_length = self._data.difficulty is not None
        if settings.ask_again and not self._controls_length:
            raise EvaluationError(
                f"evaluate.alpaca.ask_again: is for the length-controlled rate, and {settings.data} holds no "
                f"{DIFFICULTY} of its instructions; leave it out"
            )
        self.version = self._data.version
        self._settings, self._frame = settings, Frame(settings, evaluation.seed)
        self._items = tuple(
            Item(str(place), user_prompt(one.text), one.dataset or "other")
            for place, one in enumerate(self._data.instructions)
        )
        controlled = View(LENGTH_CONTROLLED, estimator=self._length_controlled, by_category=False)
        self.views = (*([controlled] if self._controls_length else []), View(WIN_RATE), View(DISCRETE))

    def items(self) -> Sequence[Item]:
        return self._items

    def more_items(self, answers: Sequence[Answered]) -> Sequence[Item]:
        overlap = overlap_of(self._gaps(answers)) if answers else None
        if not (self._settings.ask_again and overlap and overlap.extrapolates):
            return ()
        return [
            Item(f"{one.item.id}{_AGAIN}", at_length(self._instruction(one.item), overlap), one.item.category)
            for one in answers
        ]

    async def grade_all(
        self, answers: Sequence[Answered], judge: Chat | None, on_grade: Callable[[], None]
    ) -> list[Grade]:
        assert judge is not None, "a benchmark that needs a judge is given one"
        verdicts = await work_through(
            answers, lambda _, one: self._frame.judge(self._instruction(one.item), one.text, judge, on_grade)
        )
        grades = [self._grade(one, verdict) for one, verdict in zip(answers, verdicts, strict=True)]
        own = self._settings.judge is not None
        check_failures(NAME, self._judge, grades, "evaluate.alpaca.judge" if own else "evaluate.judge")
        return grades

    def judged_by(self, judge: Chat | None, rows: Rows) -> str:
        assert judge is not None, "a benchmark that needs a judge is given one"
        return self._frame.fingerprint(judge, [row.grade.raw["read_by"] for row in rows.values() if row.grade.raw])

    def notes(self, rows: Rows) -> Sequence[str]:
        kept, again = ([row for row in found if row.grades] for found in self._apart(rows))
        if not kept:
            return self._data.notes
        answered = [row.answered for row in [*kept, *again]]
        notes = [*self._data.notes, *repeated([one.text for one in answered[: len(kept)]])]
        if again:
            notes.append(f"length control includes {len(again)} judged answers that were asked for at another length")
        if self._controls_length and (warning := overlap_of(self._gaps(answered)).warning):
            notes.append(warning)
        return notes

    def export(self, folder: Path, model: str, rows: Rows) -> None:
        """Write model_outputs.json, annotations.json and leaderboard.csv, as alpaca_eval has them."""
        answers = [row.answer if (row := rows.get(item.id)) else None for item in self._items]
        folder.mkdir(parents=True, exist_ok=True)
        write_outputs(folder / "model_outputs.json", Outputs(model, tuple(answers)), self._data)
        judged, again = ([row for row in found if row.grade.raw] for found in self._apart(rows))
        annotations = [self._annotation(row, model) for row in judged]
        write_annotations(folder / "annotations.json", annotations)
        if any(one.preference is not None for one in annotations):
            found = score(annotations, self._data, 100, 0, [self._annotation(row, model) for row in again])
            write_leaderboard(folder / "leaderboard.csv", leaderboard_row(found))

    def _apart(self, rows: Rows) -> tuple[list[Graded], list[Graded]]:
        """What was answered at first, and what was asked for at another length."""
        first = [row for item in self._items if (row := rows.get(item.id))]
        return first, [row for name, row in rows.items() if name.endswith(_AGAIN)]

    def _annotation(self, row: Graded, model: str) -> Annotation:
        return annotation(
            self._instruction(row.item),
            row.answered.text,
            1 + row.grades[WIN_RATE] if row.grades else None,
            row.grade.raw["completion"],
            (self._data.baseline, model, self._judge.model),
        )

    def _instruction(self, item: Item) -> Instruction:
        return self._data.instructions[self._place(item)]

    @staticmethod
    def _place(item: Item) -> int:
        return int(item.id.removesuffix(_AGAIN))

    def _gaps(self, answers: Sequence[Answered]) -> Float[ndarray, " answers"]:
        """By how many characters the baseline's answers are longer."""
        return np.array([len(self._instruction(one.item).baseline) - len(one.text) for one in answers], dtype=float)

    def _grade(self, answer: Answered, verdict: Verdict) -> Grade:
        found = remarks(self._instruction(answer.item).text, answer.text)
        notes = [f"{kind}: {words!r}" if words else kind for kind, words in found.items()]
        judgement = verdict.reply.text if verdict.reply else ""
        raw = {"read_by": verdict.read_by, "completion": raw_completion(verdict.reply)}
        if verdict.preference is None:
            notes.append(verdict.note)
            return Grade(None, "; ".join(notes), judgement, (*found, NO_VERDICT), raw, no_reply=verdict.no_reply)
        won = verdict.preference - 1
        half = verdict.preference == TIE
        grades = {WIN_RATE: won, DISCRETE: 0.5 if half else float(verdict.preference > TIE)}
        unasked = (SAME,) if verdict.read_by == SAME else ()
        return Grade(grades, "; ".join([*notes, *unasked]), judgement, (*found, *unasked), raw)

    def _length_controlled(self, sample: Sample, resamples: int, seed: int) -> Estimate:
        kept = {item.id for item in sample.graded}
        columns = [place for place, item in enumerate(sample.items) if item.id in kept]
        draws = statistics.draws(len(sample.items), resamples, seed)[:, columns]
        return length_controlled_rates(
            [self._judged(rows, sample.graded) for rows in sample.models], self._data.gamed, draws
        )

    def _judged(self, rows: Rows, items: Sequence[Item]) -> JudgedRows:
        """A model's judged answers to the items and, after them, those to the same that were asked for again."""
        again = [rows[name] for item in items if (name := f"{item.id}{_AGAIN}") in rows and rows[name].grades]
        kept = [*(rows[item.id] for item in items), *again]
        places = [self._place(row.item) for row in kept]
        return JudgedRows(
            np.array([1 + row.grades[WIN_RATE] for row in kept if row.grades]),
            self._gaps([row.answered for row in kept]),
            self._data.difficulty_of(places),
            np.array(places),
        )
