"""What the pocket teacher says: a conversation in, a reply's text out, always the same for the same conversation.

It reads the paper's own prompts and those of a team of revisers, and answers in the identifiers that they ask for: as
Reviser, as critic, as Judge, and to a bare task as the Stronger model. What is no pocket task it politely declines.
Nothing here knows HTTP (see `teacher`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from anchored.errors import DataError
from anchored.pocket.phrasing import (
    MARKDOWN,
    MARKDOWN_OPENING,
    OPENINGS,
    PLAIN,
    Step,
    read_line,
    result_step,
    write_step,
)
from anchored.pocket.tasks import Task, grade, is_right, task_of

Part = Literal["reviser", "critic", "judge", "stronger", "none"]

REFUSAL = "I'm sorry, but I can't help with that: it is not a task of the pocket world."


@dataclass(frozen=True, slots=True)
class Lesson:
    """What the teacher has to say, and in which part it says so."""

    part: Part
    reasoning: str
    solution: str
    """The revision, the critique, the verdict (empty for a tie), the stronger answer or the refusal."""

    @property
    def text(self) -> str:
        """The reply as the paper's prompts ask for it."""
        if self.part == "reviser":
            return f"{{teacher_reasoning}}: {self.reasoning}\n\n{{corrected_student_solution}}:\n{self.solution}"
        if self.part == "judge":
            return f"{{teacher_reasoning}}: {self.reasoning}\n\n{self.solution}".rstrip()
        return self.solution


def teach(request: str) -> Lesson:
    """The lesson that the last user turn asks for."""
    try:
        if match := _AGAIN_PROMPT.search(request):
            return _reviser(task_of(match["task"]), match["draft"])
        if match := _CRITIC_PROMPT.search(request):
            return _critic(task_of(match["task"]), match["draft"])
        if match := _REVISER_PROMPT.search(request):
            return _reviser(task_of(match["task"]), match["answer"])
        if match := _JUDGE_PROMPT.search(request):
            return _judge(task_of(match["task"]), match["first"], match["second"])
        return Lesson("stronger", "", stronger_answer(task_of(request.strip())))
    except DataError:
        return Lesson("none", "", REFUSAL)


def revise(task: Task, answer: str) -> str:
    """The student's answer with what is wrong made right; right lines, the opening and the phrasing stay theirs."""
    if grade(task, answer) == 1:
        return answer
    student = _StudentLines(answer)
    steps = [*task.steps, result_step(task.result)]
    return "\n".join([*student.opening(), *(student.line(step, place) for place, step in enumerate(steps))])


def stronger_answer(task: Task) -> str:
    """A right answer in the teacher's own style: Markdown with LaTeX."""
    lines = [write_step(step, MARKDOWN) for step in task.steps]
    return "\n".join([MARKDOWN_OPENING, "", *lines, "", write_step(result_step(task.result), MARKDOWN)])


# The paper's prompts (Table 3), recognised by their identifiers; the answer runs up to the prompt's last rule.
_REVISER_PROMPT = re.compile(
    r"\n\n\{task\}: (?P<task>.*?)\n\n\{student_solution\}: (?P<answer>.*)\n\n-{17}\n", re.DOTALL
)
_CRITIC_PROMPT = re.compile(
    r"\n\n\{task\}: (?P<task>.*?)\n\n\{student_solution\}: .*?\n\n\{draft\}: (?P<draft>.*)\n\n-{17}\n", re.DOTALL
)
_AGAIN_PROMPT = re.compile(
    r"\n\n\{task\}: (?P<task>.*?)\n\n\{student_solution\}: .*?\n\n\{draft\}: (?P<draft>.*?)"
    r"\n\n\{critique\}: .*\n\n-{17}\n",
    re.DOTALL,
)
_JUDGE_PROMPT = re.compile(
    r"\n\n\{task\}: (?P<task>.*?)\n\n\{student_solution_1\}: (?P<first>.*?)"
    r"\n\n\{student_solution_2\}: (?P<second>.*)\n\n-{17}\n",
    re.DOTALL,
)


def _reviser(task: Task, answer: str) -> Lesson:
    revision = revise(task, answer)
    kept = set(answer.splitlines())
    changed = [str(number) for number, line in enumerate(revision.splitlines(), start=1) if line not in kept]
    if not changed:
        reasoning = f"Every line that is needed is there and right; the result is {task.result}."
    else:
        reasoning = f"The result has to be {task.result}. What has to change: line {', '.join(changed)}."
    return Lesson("reviser", reasoning, revision)


def _critic(task: Task, draft: str) -> Lesson:
    share = grade(task, draft)
    if share == 1:
        return Lesson("critic", "", "Nothing is to be mended.")
    return Lesson("critic", "", f"The result has to be {task.result}; {share:.0%} of the lines are right.")


def _judge(task: Task, first: str, second: str) -> Lesson:
    """Right result first, then right lines. Of two equally good answers neither is named, though the prompt asks for
    [2] then: a coin's verdict would make a pair of two answers that do not differ in quality."""
    scores = [(is_right(task, answer), grade(task, answer)) for answer in (first, second)]
    told = [f"{'the right' if right else 'no right'} result and {share:.0%} of the lines" for right, share in scores]
    reasoning = f"The first solution has {told[0]} right, the second {told[1]}."
    if scores[0] == scores[1]:
        return Lesson("judge", f"{reasoning} It is a tie: neither is better.", "")
    return Lesson("judge", reasoning, "[1]" if scores[0] > scores[1] else "[2]")


class _StudentLines:
    """A student's answer line by line, as a model for how the revision is worded."""

    def __init__(self, answer: str) -> None:
        self._texts = [line for line in answer.splitlines() if line.strip()]
        self._read = [read_line(line) for line in self._texts]
        self._lines = [line for line in self._read if line is not None]
        self._text_of: dict[Step, str] = {}
        for text, line in zip(self._texts, self._read, strict=True):
            if line is not None:
                self._text_of.setdefault(line.step, text)

    def opening(self) -> list[str]:
        """The first line, if it is one of words (braces could be taken for the reply's own identifiers)."""
        if not self._lines:
            return [OPENINGS[0]]
        return [] if self._read[0] or "{" in self._texts[0] else [self._texts[0]]

    def line(self, step: Step, place: int) -> str:
        """The student's own line if they say this step, else the step in the phrasing they use there."""
        return self._text_of.get(step) or write_step(step, self._phrasing(step, place))

    def _phrasing(self, step: Step, place: int) -> int:
        alike = [line.phrasing for line in self._lines if line.step.kind == step.kind]
        if alike:
            return alike[min(place, len(alike) - 1)]
        return self._lines[-1].phrasing if self._lines else PLAIN[0]
