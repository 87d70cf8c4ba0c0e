"""clair: a stronger model minimally revises the policy's answer; so may a team, and of several revisions one is taken.

How a reply is taken apart stands in `revision`. A row whose revision fails at any step ends with that step's outcome.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from anchored import contrast
from anchored.create.desk import Desk
from anchored.create.filters import filtered
from anchored.create.judge import compare
from anchored.create.replies import Problem, Usable, beginning, is_refusal
from anchored.create.revision import parse
from anchored.create.settings import StepSettings, step_role
from anchored.records import Outcome, Pair, Prompt, as_text


@dataclass(frozen=True, slots=True)
class Revised:
    """A revised answer, who wrote it, and why it was revised so."""

    answer: Usable
    rational: str


@dataclass(frozen=True, slots=True)
class Failed:
    """A revision that could not be had, and who was asked for it last."""

    problem: Problem
    model: str = ""


async def clair(prompt: Prompt, desk: Desk) -> Pair:
    """Eq. 1: y_l sampled from the policy, y_w = Reviser(x, y_l)."""
    rejected = await desk.sample(prompt)
    if isinstance(rejected, Problem):
        return desk.refused(prompt, rejected)
    best_of = desk.settings.best_of
    indices = range(best_of.n if best_of else 1)
    revisions = await asyncio.gather(*(_revision(prompt, rejected, desk, index) for index in indices))
    rows = [_row(prompt, rejected, revision, desk) for revision in revisions]
    passed = [row for row in rows if row.outcome is Outcome.OK]
    if not passed or len(rows) == 1:
        return rows[0]
    if best_of and best_of.by == "judge":
        return await _best_by_judge(prompt, passed, desk)
    return max(passed, key=lambda row: contrast.jaccard(row.chosen.text, row.rejected.text))


async def _revision(prompt: Prompt, rejected: Usable, desk: Desk, index: int) -> Revised | Failed:
    if desk.settings.team:
        return await _revision_by_team(prompt, rejected, desk, index)
    task = as_text(prompt)
    reply = await desk.teach("teacher", {"prompt": task, "answer": rejected.text}, index)
    return _taken_apart(reply, rejected, task)


async def _revision_by_team(prompt: Prompt, rejected: Usable, desk: Desk, index: int) -> Revised | Failed:
    """The last revision of the steps, with the reasoning of all of them."""
    current, task = Revised(rejected, ""), as_text(prompt)
    slots, reasoning = {"prompt": task, "answer": rejected.text}, []
    for place, step in enumerate(desk.settings.team):
        reply = await desk.teach(step_role(place), slots, index)
        found = _step(reply, step, current, task)
        if isinstance(found, Failed):
            problem = replace(found.problem, detail=f"{step_role(place)} ({step.does}): {found.problem.detail}")
            return Failed(problem, found.model)
        reasoning.append(f"{step_role(place)}, {step.does} ({step.model}): {found.rational}")
        if step.does == "critique":
            slots["critique"] = found.rational
        else:
            current = found
            slots["revision"] = current.answer.text
    if current.answer.text.strip() == rejected.text.strip():
        problem = Problem(Outcome.IDENTICAL, "the team's revision is the policy's answer", current.answer.text)
        return Failed(problem, current.answer.model)
    return Revised(current.answer, "\n\n".join(reasoning))


def _step(reply: Usable | Problem, step: StepSettings, current: Revised, task: str) -> Revised | Failed:
    """What a step of a team adds: a revision, or the answer as it was with a critique."""
    if step.does == "critique" and isinstance(reply, Usable) and is_refusal(reply.text):
        return Failed(Problem(Outcome.REFUSAL, f"the critic's reply: {beginning(reply.text)}", reply.text), reply.model)
    if step.does == "critique" and isinstance(reply, Usable):
        return Revised(current.answer, reply.text.strip())
    found = _taken_apart(reply, current.answer, task)
    if isinstance(found, Failed) and found.problem.outcome is Outcome.IDENTICAL:
        return Revised(current.answer, "nothing is left to revise")
    return found


def _taken_apart(reply: Usable | Problem, revised: Usable, task: str) -> Revised | Failed:
    if isinstance(reply, Problem):
        return Failed(reply)
    revision = parse(reply.text, revised.text, task)
    if isinstance(revision, Problem):
        return Failed(revision, reply.model)
    return Revised(replace(reply, text=revision.text), revision.rational)


def _row(prompt: Prompt, rejected: Usable, revision: Revised | Failed, desk: Desk) -> Pair:
    if isinstance(revision, Failed):
        return desk.refused(prompt, revision.problem, rejected, revision.model)
    return filtered(desk.pair(prompt, revision.answer, rejected, revision.rational), desk.filters)


async def _best_by_judge(prompt: Prompt, rows: Sequence[Pair], desk: Desk) -> Pair:
    """The revision that wins against each later one, asked in turn; who is not found better takes no one's place.

    n revisions take n - 1 verdicts. Where the judge gives none, the row ends: a failed judge picks nothing.
    """
    best = rows[0]
    for place, row in enumerate(rows[1:], 1):
        if row.chosen.text == best.chosen.text:
            continue
        shown = _shown(best), _shown(row)
        verdict = await compare(prompt, shown, desk, "judge", place)
        if isinstance(verdict, Problem) and verdict.outcome is not Outcome.DISAGREEMENT:
            detail = f"best_of: {verdict.detail}"
            return replace(best, outcome=verdict.outcome, detail=detail)
        if not isinstance(verdict, Problem) and verdict.winner == 1:
            best = row
    return best


def _shown(row: Pair) -> Usable:
    return Usable(row.chosen.text, row.chosen.model)
