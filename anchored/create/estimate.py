"""What all rows will cost, by the first few: their costs in, an estimate with its interval out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from anchored.llm.money import dollars


@dataclass(frozen=True, slots=True)
class Estimate:
    """USD for all rows, with the 95 % interval of the mean of a sample."""

    usd: float
    low: float
    high: float
    rows: int
    """All of them, those of the pilot included."""
    pilot: int
    """Rows that it was made of."""

    def told(self, spent: float, budget: float | None) -> str:
        """One line for people; `spent` and `budget` are the run's, in USD."""
        text = (
            f"by the first {self.pilot} rows, all {self.rows:,} will cost about {dollars(self.usd)} "
            f"(95 % interval {dollars(self.low)} to {dollars(self.high)}), of which {dollars(spent)} are spent"
        )
        if budget is None or self.high <= budget:
            return text
        enough = int(self.rows * budget / self.usd)
        reached = "will be reached" if self.low > budget else "may be reached"
        return f"{text}; create.budget_usd, {dollars(budget)}, {reached}: it is enough for about {enough:,} rows"


def estimate(costs: Sequence[float], rows: int) -> Estimate:
    """What `rows` rows will cost, if the rows that cost `costs` (in USD, two or more) are like the others.

    The interval is Student's; it is exact where all rows are asked already.
    """
    mean = statistics.fmean(costs)
    error = statistics.stdev(costs) / math.sqrt(len(costs)) * math.sqrt(max(0.0, 1 - len(costs) / rows))
    off = _student(len(costs) - 1) * error
    return Estimate(rows * mean, rows * max(0.0, mean - off), rows * (mean + off), rows, len(costs))


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t (Abramowitz and Stegun 26.7.5), to 0.5 % from 4 degrees of freedom."""
    z = statistics.NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
