"""stronger-preferred: the teacher's own answer wins over the policy's."""

from __future__ import annotations

from dataclasses import replace

from anchored.create.desk import Desk
from anchored.create.replies import Problem, beginning, is_refusal
from anchored.records import Outcome, Pair, Prompt


async def stronger_preferred(prompt: Prompt, desk: Desk) -> Pair:
    """Eq. 4: y_l sampled from the policy, y_w the stronger model's answer to x."""
    rejected = await desk.sample(prompt)
    if isinstance(rejected, Problem):
        return desk.refused(prompt, rejected)
    chosen = await desk.answer(prompt)
    if isinstance(chosen, Problem):
        return desk.refused(prompt, chosen, rejected)
    chosen = replace(chosen, text=chosen.text.strip())
    problem = None
    if chosen.text == rejected.text.strip():
        problem = Problem(Outcome.IDENTICAL, "both gave the same answer", chosen.text)
    elif is_refusal(chosen.text) and not is_refusal(rejected.text):
        problem = Problem(Outcome.REFUSAL, f"the teacher's answer: {beginning(chosen.text)}", chosen.text)
    return desk.refused(prompt, problem, rejected, chosen.model) if problem else desk.pair(prompt, chosen, rejected)
