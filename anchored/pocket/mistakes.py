"""The student whose answers the policy learns in pretraining: mostly sound, with misconceptions and slips.

In: a task and a random generator. Out: an answer's text. Misconceptions, not slips alone, make the policy's mistakes:
greedy decoding averages independent slips away, and keeps what is believed more often than not.
"""

from __future__ import annotations

from random import Random

from anchored.pocket.phrasing import OPENINGS, PLAIN, result_step, write_step
from anchored.pocket.problems import Mind
from anchored.pocket.tasks import Task, solve

# How often each misconception strikes where it can. Above one half greedy decoding shows it, below it does not.
_STRENGTH = {
    "the ones carry nothing": 0.7,
    "the tens carry nothing": 0.4,
    "an hour has 100 minutes": 0.7,
    "there is a coin of 25": 0.7,
    "there is no coin of 2": 0.4,
    "at least and more than are swapped": 0.7,
    "a number that comes twice is written once": 0.7,
}
_SLIP = 0.02


class Student(Mind):
    """What one student believes while answering one task: each misconception is held throughout, or not at all."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._beliefs = {name for name, strength in _STRENGTH.items() if rng.random() < strength}

    def believes(self, misconception: str) -> bool:
        return misconception in self._beliefs

    def slips(self) -> bool:
        return self._rng.random() < _SLIP


def student_answer(task: Task, rng: Random) -> str:
    """A student's answer, in an opening and phrasings of their own."""
    solution = solve(task, Student(rng))
    lines = [write_step(step, rng.choice(PLAIN)) for step in (*solution.steps, result_step(solution.result))]
    return "\n".join([rng.choice(OPENINGS), *lines])
