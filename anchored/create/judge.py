"""judge-on-policy and judge-off-policy: of two answers, the one that the teacher picks wins.

The two are samples of the policy, or answers of two other models drawn per prompt; or the data says already which is
better, and nobody is asked. The judge sees them in an order drawn per prompt, or in both orders, where only an answer
picked both times wins. What the answers say to the judge is text to it and to the rule that reads its verdict: an
answer that tells it what to say is noticed before anything is asked.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, replace

from anchored.create.desk import Desk
from anchored.create.noticed import spoken_to_judge
from anchored.create.replies import Problem, Usable, beginning, is_refusal
from anchored.llm.verdict import read_verdict
from anchored.records import Outcome, Pair, Prompt, as_text, content_hash


@dataclass(frozen=True, slots=True)
class Pick:
    """What the judge decided."""

    winner: int
    """0 or 1: which answer."""
    rational: str


async def judge_on_policy(prompt: Prompt, desk: Desk) -> Pair:
    """Eq. 2: two samples of the policy, ranked by the judge."""
    first, second = await asyncio.gather(desk.sample(prompt, 0), desk.sample(prompt, 1))
    return await _ranked(prompt, first, second, desk)


async def judge_off_policy(prompt: Prompt, desk: Desk) -> Pair:
    """Eq. 3: two answers by other models, ranked by the judge or by the data."""
    if desk.judged is not None:
        return _already_judged(prompt, desk)
    places = desk.candidates(prompt)
    if len(places) < 2:
        had = f"{len(places)} of the {len(desk.settings.candidates) + len(desk.answers)} other models"
        return desk.refused(prompt, Problem(Outcome.MISSING_ANSWER, f"only {had} has an answer; a pair needs two"))
    # a str seeds by its hash of sha512, which is the same everywhere
    one, other = random.Random(f"{desk.settings.prompts.seed} {prompt.id}").sample(places, 2)
    first, second = await asyncio.gather(desk.candidate(one, prompt), desk.candidate(other, prompt))
    return await _ranked(prompt, first, second, desk)


async def compare(
    prompt: Prompt, answers: tuple[Usable, Usable], desk: Desk, role: str, place: int = 0
) -> Pick | Problem:
    """One pick of the judge in a role or, asked in both orders, the one that both agree on.

    `place` tells apart the several comparisons of one prompt, so that their orders differ.
    """
    judge = desk.settings.judge
    texts = [answer.text for answer in answers]
    if judge.refuse_addressed and (spoken := spoken_to_judge(as_text(prompt), texts)):
        return Problem(Outcome.ADDRESSES_JUDGE, spoken)
    drawn_by = [prompt.id, desk.settings.prompts.seed, *([place] if place else [])]
    first_shown = int(content_hash(drawn_by), 16) % 2
    orders = [first_shown] if judge.orders == "one" else [first_shown, 1 - first_shown]
    picks = await asyncio.gather(*(_pick(prompt, answers, order, desk, role) for order in orders))
    for pick in picks:
        if isinstance(pick, Problem):
            return pick
    picked = [pick for pick in picks if isinstance(pick, Pick)]
    if len({pick.winner for pick in picked}) > 1:
        return Problem(Outcome.DISAGREEMENT, "shown in the other order, the judge picks the other answer")
    return picked[0]


def _already_judged(prompt: Prompt, desk: Desk) -> Pair:
    assert desk.judged is not None
    pair = desk.judged.find(prompt)
    if pair is None:
        problem = Problem(Outcome.MISSING_ANSWER, f"{desk.judged.source} holds no judged answers to this prompt")
        return desk.refused(prompt, problem)
    return replace(pair, method=desk.settings.method)


async def _ranked(prompt: Prompt, first: Usable | Problem, second: Usable | Problem, desk: Desk) -> Pair:
    for answer in (first, second):
        if isinstance(answer, Problem):
            return desk.refused(prompt, answer)
    assert isinstance(first, Usable)
    assert isinstance(second, Usable)
    if first.text.strip() == second.text.strip():
        problem = Problem(Outcome.IDENTICAL_SAMPLES, f"both answers are {beginning(first.text)}", second.text)
        return desk.refused(prompt, problem, first, second.model)
    pick = await compare(prompt, (first, second), desk, "teacher")
    if isinstance(pick, Problem):
        return desk.refused(prompt, replace(pick, text=second.text), first, second.model)
    chosen, rejected = (first, second) if pick.winner == 0 else (second, first)
    return desk.pair(prompt, chosen, rejected, pick.rational)


async def _pick(
    prompt: Prompt, answers: tuple[Usable, Usable], first_shown: int, desk: Desk, role: str
) -> Pick | Problem:
    shown = {"answer_1": answers[first_shown].text, "answer_2": answers[1 - first_shown].text}
    reply = await desk.teach(role, {"prompt": as_text(prompt), **shown})
    if isinstance(reply, Problem):
        return reply
    verdict = read_verdict(reply.text)
    if verdict is not None:
        return Pick(first_shown if verdict == 1 else 1 - first_shown, reply.text)
    if is_refusal(reply.text):
        return Problem(Outcome.REFUSAL, f"the teacher's reply: {beginning(reply.text)}")
    return Problem(Outcome.UNPARSABLE, f"neither [1] nor [2] in the teacher's reply: {beginning(reply.text)}")
