"""MixEval-Hard: 1000 rows of 16 or 17 benchmarks, their official prompts, a judge's verdicts, the official score.

Half are free form, graded 0..1, and half multiple choice. Many rows are the same question (446 different ones in
2024-06-01), so a judge is asked once for all of them, and they are one cluster to the statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random

from anchored.errors import EvaluationError
from anchored.evaluate.benchmark import (
    NO_VERDICT,
    SPEAKS_TO_JUDGE,
    Answered,
    Benchmark,
    Grade,
    Item,
    Rows,
    View,
    question_hash,
)
from anchored.evaluate.judging import Question, Ruling, ask_judge, check_failures, grader
from anchored.evaluate.mixeval_files import Files, Row, Version, letter, read_files
from anchored.evaluate.mixeval_judge import (
    REMINDER,
    in_another_script,
    official_prompts,
    own_prompts,
    plain_letter,
    speaks_to_judge,
)
from anchored.evaluate.settings import EvaluateSettings, MixEvalSettings
from anchored.llm.chat import Chat
from anchored.records import user_prompt

READ_PLAINLY = "read without the judge"
AT_RANDOM = "graded at random"
FOREIGN = "judged in another script"

_STEP_BY_STEP = frozenset({"BBH", "GSM8k", "MATH"})
_PAPER: Version = "2024-06-01"
"""The version of the paper's Table 4, which leaves free-form AGIEval out."""


class MixEvalHard(Benchmark):
    """One version as a benchmark."""

    def __init__(self, version: Version, evaluation: EvaluateSettings) -> None:
        self.name = f"mixeval-hard/{version}"
        self.judge = self._judge = grader(self.name, evaluation.judge)
        settings = evaluation.mixeval
        files = read_files(settings.data, version, official=settings.official_data)
        self.version = files.content
        self._settings, self._seed = settings, evaluation.seed
        self._prompts = official_prompts(settings.official_prompts) if settings.official_prompts else own_prompts()
        self._rows = {f"{row.split}/{row.id}": row for row in files.rows}
        self._items = tuple(_item(name, row) for name, row in self._rows.items())
        self.views = _views(version, files, self._rows, settings)

    def items(self) -> Sequence[Item]:
        return self._items

    def judged_by(self, judge: Chat | None, rows: Rows) -> str:
        settings, mixeval = self._judge, self._settings
        facts = [
            judge.fingerprint if judge else settings.model,
            f"{'official' if self._prompts.official else 'own'} prompts {self._prompts.sha256[:8]}",
            f"temperature {settings.temperature:g}",
            f"top_p {settings.top_p:g}" if settings.top_p != 1 else "",
            f"max_tokens {settings.max_tokens}",
            "plain letters read without it" if mixeval.read_letters else "",
            "at random without a verdict" if mixeval.without_verdict == "random" else "",
        ]
        return ", ".join(filter(None, facts))

    async def grade_all(
        self, answers: Sequence[Answered], judge: Chat | None, on_grade: Callable[[], None]
    ) -> list[Grade]:
        assert judge is not None, "a benchmark that needs a judge is given one"
        grades: list[Grade | None] = [self._plainly_read(answer) for answer in answers]
        open_places = [place for place, grade in enumerate(grades) if grade is None]
        for _ in range(len(answers) - len(open_places)):
            on_grade()
        questions = [self._question(answers[place]) for place in open_places]
        reminder = "" if self._prompts.official else REMINDER

        def grade(question: int, ruling: Ruling[float | str]) -> None:
            place = open_places[question]
            grades[place] = self._grade(answers[place], ruling)
            on_grade()

        await ask_judge(judge, questions, self._judge.tries, reminder, grade)
        found = [grade for grade in grades if grade is not None]
        if self._settings.without_verdict == "leave-out":
            check_failures(self.name, self._judge, found)
        return found

    def _question(self, answer: Answered) -> Question[float | str]:
        row = self._rows[answer.item.id]
        request = self._judge.request(self._prompts.ask(row, answer.text), seed=self._seed)
        return Question(request, lambda reply: self._prompts.read(row, reply))

    def _plainly_read(self, answer: Answered) -> Grade | None:
        row = self._rows[answer.item.id]
        if row.split == "free-form" or not self._settings.read_letters:
            return None
        chosen = plain_letter(row, answer.text)
        return self._graded(float(chosen in row.target), remarks=(READ_PLAINLY,)) if chosen else None

    def _grade(self, answer: Answered, ruling: Ruling[float | str]) -> Grade:
        row = self._rows[answer.item.id]
        spoken = speaks_to_judge(row, answer.text)
        remarks = [SPEAKS_TO_JUDGE] if spoken else []
        notes = [f"speaks to the judge: {spoken!r}"] if spoken else []
        if in_another_script(ruling.reply):
            remarks.append(FOREIGN)
        verdict = ruling.verdict
        if verdict is None:
            remarks.append(NO_VERDICT)
            notes.append(ruling.failure)
            if self._settings.without_verdict == "leave-out":
                return Grade(None, "; ".join(notes), ruling.reply, tuple(remarks), no_reply=ruling.no_reply)
            remarks.append(AT_RANDOM)
            verdict = self._drawn(answer, row, ruling)
        value = verdict if isinstance(verdict, float) else float(verdict in row.target)
        return self._graded(value, "; ".join(notes), ruling.reply, tuple(remarks))

    def _graded(self, value: float, note: str = "", reply: str = "", remarks: tuple[str, ...] = ()) -> Grade:
        return Grade({view.name: value for view in self.views}, note, reply, remarks)

    def _drawn(self, answer: Answered, row: Row, ruling: Ruling[float | str]) -> float | str:
        """What the official code makes of an answer without a verdict, drawn by seed, item and answer."""
        random = Random(f"{self._seed} {self.name} {answer.item.id} {answer.text}")
        if row.split == "multiple-choice":
            return letter(random.randrange(len(row.options)))
        return 0.0 if ruling.refused else round(random.random(), 1)


def _item(name: str, row: Row) -> Item:
    prompt = user_prompt(question(row), id=name)
    about = question_hash(row.context or "", row.prompt, *(row.options or ()))
    # what is asked, not the row's name
    return Item(name, prompt, row.benchmark, user_prompt(question(row)).id, row.split, (about,))


def question(row: Row) -> str:
    """What the evaluated model is asked, to the letter as the official code asks it."""
    has_context = row.context is not None and row.context.strip() and row.context.lower() not in ("none", "null")
    asked = f"{row.context}\n{row.prompt}" if has_context else row.prompt
    if row.split == "multiple-choice":
        options = "\n".join(f"{letter(place)}. {option}" for place, option in enumerate(row.options))
        return f"{asked}\n{options}\nAnswer with the option letter from the given choices directly."
    if row.benchmark in _STEP_BY_STEP:
        return f"Question: {asked}\nAnswer the question. \nLet's think step by step."
    return f"Question: {asked}\nAnswer the question shortly."


def _views(version: Version, files: Files, rows: Mapping[str, Row], settings: MixEvalSettings) -> tuple[View, ...]:
    views = (View("official", decimals=3), View("exact"))
    if not files.official:
        return views
    if version == _PAPER:
        apart = frozenset(name for name, row in rows.items() if (row.split, row.benchmark) == ("free-form", "AGIEval"))
        return (*views, View("paper", decimals=3, only_in_whole=apart))
    try:
        chosen_on = {question(row) for row in read_files(settings.data, _PAPER).rows}
    except EvaluationError:  # the other version's files are not there
        return views
    shared = frozenset(name for name, row in rows.items() if question(row) in chosen_on)
    return (*views, View(f"without {_PAPER}", left_out=shared))
