"""judge-on-policy: of two answers that the policy sampled, the one that the teacher picks wins.

The teacher sees the two in an order drawn per prompt, or in both orders, where only an answer picked both times wins.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

from anchored.create.desk import Desk
from anchored.create.replies import Problem, Usable, beginning, is_refusal
from anchored.llm.verdict import read_verdict
from anchored.records import Outcome, Pair, Prompt, as_text, content_hash


@dataclass(frozen=True, slots=True)
class Pick:
    """What the judge decided."""

    winner: int
    """0 or 1: which sample."""
    rational: str


async def judge_on_policy(prompt: Prompt, desk: Desk) -> Pair:
    """Eq. 2: two samples of the policy, ranked by the judge."""
    first, second = await asyncio.gather(desk.sample(prompt, 0), desk.sample(prompt, 1))
    for sample in (first, second):
        if isinstance(sample, Problem):
            return desk.refused(prompt, sample)
    assert isinstance(first, Usable)
    assert isinstance(second, Usable)
    if first.text.strip() == second.text.strip():
        problem = Problem(Outcome.IDENTICAL_SAMPLES, f"both samples are {beginning(first.text)}", second.text)
        return desk.refused(prompt, problem, first, second.model)
    pick = await _judged(prompt, (first, second), desk)
    if isinstance(pick, Problem):
        return desk.refused(prompt, replace(pick, text=second.text), first, second.model)
    chosen, rejected = (first, second) if pick.winner == 0 else (second, first)
    return desk.pair(prompt, chosen, rejected, pick.rational)


async def _judged(prompt: Prompt, samples: tuple[Usable, Usable], desk: Desk) -> Pick | Problem:
    """One pick, or, asked in both orders, the one that both agree on."""
    first_shown = int(content_hash([prompt.id, desk.settings.prompts.seed]), 16) % 2
    orders = [first_shown] if desk.settings.judge.orders == "one" else [first_shown, 1 - first_shown]
    picks = await asyncio.gather(*(_pick(prompt, samples, order, desk) for order in orders))
    for pick in picks:
        if isinstance(pick, Problem):
            return pick
    winners = {pick.winner for pick in picks if isinstance(pick, Pick)}
    if len(winners) > 1:
        return Problem(Outcome.DISAGREEMENT, "shown in the other order, the judge picks the other answer")
    return picks[0]


async def _pick(prompt: Prompt, samples: tuple[Usable, Usable], first_shown: int, desk: Desk) -> Pick | Problem:
    shown = {"answer_1": samples[first_shown].text, "answer_2": samples[1 - first_shown].text}
    reply = await desk.teach(prompt=as_text(prompt), **shown)
    if isinstance(reply, Problem):
        return reply
    verdict = read_verdict(reply.text)
    if verdict is not None:
        return Pick(first_shown if verdict == 1 else 1 - first_shown, reply.text)
    if is_refusal(reply.text):
        return Problem(Outcome.REFUSAL, f"the teacher's reply: {beginning(reply.text)}")
    return Problem(Outcome.UNPARSABLE, f"neither [1] nor [2] in the teacher's reply: {beginning(reply.text)}")
