"""Questions to a judge, each until a verdict can be read: asked once where it comes several times, and never guessed.

In: a chat, requests, and how to read each reply. Out: a ruling for each, with the reply; what got no verdict says why.
What a verdict means is the benchmark's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from anchored.errors import EvaluationError, NoReply, ReplyError, Stopped
from anchored.evaluate.benchmark import NO_VERDICT, Grade
from anchored.evaluate.settings import GraderSettings
from anchored.llm.ask import work_through
from anchored.llm.chat import Chat, Request
from anchored.records import Message

Verdict = TypeVar("Verdict")


@dataclass(frozen=True, slots=True)
class Question(Generic[Verdict]):
    """What the judge is asked, and what its reply says; None where it says nothing readable."""

    request: Request
    read: Callable[[str], Verdict | None]


@dataclass(frozen=True, slots=True)
class Ruling(Generic[Verdict]):
    """What came of a question."""

    verdict: Verdict | None
    reply: str = ""
    """The judge's last reply."""
    failure: str = ""
    """Why there is no verdict."""
    refused: bool = False
    """Whether the endpoint gave no reply at all to this request."""
    no_reply: bool = False
    """Whether all attempts failed for want of the endpoint."""
    asked: int = 1


async def ask_judge(
    judge: Chat,
    questions: Sequence[Question[Verdict]],
    tries: int,
    reminder: str = "",
    on_ruling: Callable[[int, Ruling[Verdict]], None] = lambda _place, _ruling: None,
) -> list[Ruling[Verdict]]:
    """A ruling for each question, in their order; equal requests are one question.

    `on_ruling(place, ruling)` hears of each as it is made: work on it then costs no time, for others are waited for.
    A reply without a verdict is answered with `reminder`, where there is one, or asked for again. Raises Stopped or
    ModelError where the judge is down or of no use to anybody.
    """
    places: dict[Request, list[int]] = {}
    for place, question in enumerate(questions):
        places.setdefault(question.request, []).append(place)

    async def rule(_: int, request: Request) -> Ruling[Verdict]:
        ruling = await _rule(judge, questions[places[request][0]], tries, reminder)
        for place in places[request]:
            on_ruling(place, ruling)
        return ruling

    unique = dict(zip(places, await work_through(places, rule), strict=True))
    return [unique[question.request] for question in questions]


def grader(benchmark: str, settings: GraderSettings | None) -> GraderSettings:
    """The judge, which has to be there."""
    if settings is None:
        raise EvaluationError(
            f"evaluate.judge: {benchmark} is graded by a model; name one, as in evaluate.judge.model=gpt-4o-mini "
            "(docs/evaluate.md)"
        )
    return settings


def check_failures(
    benchmark: str, judge: GraderSettings, grades: Sequence[Grade], section: str = "evaluate.judge"
) -> None:
    """Raise EvaluationError where more are without a verdict than the judge's settings, in `section`, allow.

    Stopped, where they would not be too many had the judge's endpoint replied each time: what it owes is asked again.
    """
    failed = [grade for grade in grades if NO_VERDICT in grade.remarks]
    owed = [grade for grade in failed if grade.no_reply]
    allowed = judge.most_failed * len(grades)
    if len(failed) > allowed >= len(failed) - len(owed):
        raise Stopped(
            f"{benchmark}: {judge.model} gave no reply about {len(owed)} of {len(grades)} answers, and "
            f"{section}.most_failed is {judge.most_failed:g}; the first: {owed[0].note}; "
            "the same command asks about them again"
        )
    if len(failed) > allowed:
        said = " ".join(failed[0].judgement.split())[:100]
        first = f"{failed[0].note} ({said!r})" if said else failed[0].note
        raise EvaluationError(
            f"{benchmark}: {judge.model} gave no verdict on {len(failed)} of {len(grades)} answers, and "
            f"{section}.most_failed is {judge.most_failed:g}; the first: {first}; "
            "take another judge, or raise max_tokens if its replies are cut"
        )


async def _rule(judge: Chat, question: Question[Verdict], tries: int, reminder: str) -> Ruling[Verdict]:
    request, text, failure = question.request, "", ""
    for index in range(tries):
        try:
            reply = await judge.reply(replace(request, index=index))
        except ReplyError as error:
            return Ruling(None, text, str(error), True, isinstance(error, NoReply), index + 1)
        text = reply.text
        # what was cut may hold marks, and none of them is the verdict
        cut = reply.finish_reason in ("length", "content_filter")
        verdict = None if cut else question.read(text)
        if verdict is not None:
            return Ruling(verdict, text, asked=index + 1)
        failure = "no verdict in the judge's reply"
        if cut:
            failure = f"the judge's reply was not whole, finish_reason is {reply.finish_reason!r}"
        elif reminder and text.strip():
            told = (Message("assistant", text), Message("user", reminder))
            request = replace(question.request, messages=(*question.request.messages, *told))
    return Ruling(None, text, f"{failure}, asked {tries} times" if tries > 1 else failure, asked=tries)
