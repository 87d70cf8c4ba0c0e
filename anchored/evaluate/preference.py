"""AlpacaEval's preferences: from what a judge said to a number from 1 (the baseline's answer) to 2 (the model's).

A judge sees two answers as `m` (shown first) and `M`, in an order that a hash of the instruction draws, and names the
better one. Where its endpoint tells how likely each name was, the preference is graded; else it is 1 or 2.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from numpy import ndarray

from anchored.errors import EvaluationError

FIRST, SECOND = "m", "M"
"""What the answers are called in the order in which they are shown."""
TIE = 1.5
_AROUND = " \t\r\n\"'`*.()[]{}"


@dataclass(frozen=True, slots=True)
class WinRate:
    """How often a model wins against the baseline, in percent; over what was judged, and nothing else."""

    win_rate: float
    standard_error: float
    """Standard deviation of the mean over instructions; nan for a single one."""
    discrete_win_rate: float
    """Each instruction is won, lost or, at exactly 1.5, half won."""
    wins: int
    losses: int
    draws: int


def win_rate(preferences: Float[ndarray, " rows"]) -> WinRate:
    """The official numbers; raises EvaluationError where a preference is no number from 1 to 2, or there is none."""
    check_preferences(preferences)
    wins, losses = int((preferences > TIE).sum()), int((preferences < TIE).sum())
    n = len(preferences)
    draws = n - wins - losses
    error = float(preferences.std(ddof=1)) / n**0.5 if n > 1 else math.nan
    return WinRate(100 * float(preferences.mean() - 1), 100 * error, 100 * (wins + draws / 2) / n, wins, losses, draws)


def check_preferences(preferences: Float[ndarray, " rows"]) -> None:
    """Raise EvaluationError unless each is a number from 1 to 2, and there is one."""
    if not len(preferences):
        raise EvaluationError("no instruction was judged, so there is nothing to score; see why the judge failed")
    off = ~((preferences >= 1) & (preferences <= 2))  # NaN is off too
    if off.any():
        row = int(off.argmax())
        raise EvaluationError(
            f"{int(off.sum())} of {len(off)} preferences are not from 1 to 2 (row {row}: {preferences[row]}); "
            "leave out and count what was not judged"
        )


def is_switched(instruction: str, seed: int = 0) -> bool:
    """Whether the model's answer is shown first; the same for everybody, as the official package draws it."""
    return random.Random(f"is_switched_outputs{instruction}{seed}").choices([False, True], k=1)[0]


def for_the_second(shown_second: float, switched: bool) -> float:
    """The preference for the model, from the one for the answer that was shown second."""
    return 3 - shown_second if switched else shown_second


def from_logprobs(tokens: Mapping[str, float]) -> float | None:
    """The preference for the answer that was shown second, by the log-probabilities of the judge's one token.

    A name that is not among the likeliest tokens counts as impossible; None where neither is.
    """
    first, second = (_logprob(tokens.get(name)) for name in (FIRST, SECOND))
    if max(first, second) == -math.inf:
        return None
    if min(first, second) == -math.inf:
        return 1.0 if first > second else 2.0
    return 2 - 1 / (1 + math.exp(min(second - first, 700)))


def from_text(text: str) -> float | None:
    """The preference for the answer that was shown second, if the reply names one answer and says nothing else.

    A last line that is a name counts as well, for judges that think aloud first.
    """
    lines = [line.strip(_AROUND) for line in re.split(r"[\r\n]+", text.strip())]
    return {FIRST: 1.0, SECOND: 2.0}.get(lines[-1])


def _logprob(value: float | None) -> float:
    return -math.inf if value is None or math.isnan(value) else value
