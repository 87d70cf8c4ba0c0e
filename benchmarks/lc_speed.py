"""How long AlpacaEval's length-controlled win rate of one model takes, with the refits behind its interval.

    OMP_NUM_THREADS=1 python benchmarks/lc_speed.py [--refits 1000]

One model's 805 rows and 1610 rows of regression data, drawn with the spread of published ones; the refits go over
resampled instructions.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from anchored.evaluate.length_control import GamedRows, JudgedRows, length_controlled, refit
from anchored.evaluate.statistics import draws

INSTRUCTIONS = 805


def make_rows(rng: np.random.Generator, difficulty: np.ndarray) -> JudgedRows:
    gap = rng.normal(900, 800, INSTRUCTIONS).round()
    logit = -1.5 * np.tanh(gap / gap.std(ddof=1)) + 0.8 * difficulty - 1 + rng.normal(0, 3, INSTRUCTIONS)
    return JudgedRows(1 + 1 / (1 + np.exp(-logit)), gap, difficulty)


def make_gamed(rng: np.random.Generator, difficulty: np.ndarray) -> GamedRows:
    std_gap = np.concatenate([rng.normal(1.5, 1, INSTRUCTIONS), rng.normal(-1.5, 1, INSTRUCTIONS)])
    rate = 1 / (1 + np.exp(1.5 * np.tanh(std_gap) + rng.normal(0, 1, 2 * INSTRUCTIONS)))
    return GamedRows(rate, std_gap, np.tile(difficulty, 2), np.tile(np.arange(INSTRUCTIONS), 2))


def seconds(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refits", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0, 1.3, INSTRUCTIONS)
    rows, gamed = make_rows(rng, difficulty), make_gamed(rng, difficulty)
    fit = length_controlled(rows, gamed)
    once = seconds(lambda: length_controlled(rows, gamed), asked.repeats)
    drawn = draws(len(rows.gap), asked.refits, 0)
    again = seconds(lambda: refit(rows, gamed, fit.c, drawn), asked.repeats)
    spread = refit(rows, gamed, fit.c, drawn).std()
    print(
        f"length-controlled {fit.win_rate:.2f} % (C {fit.c:.3g}), standard error {fit.standard_error:.2f}, of refits "
        f"{spread:.2f}\n51 fits of cross-validation: {once:.3f} s; {asked.refits:,} refits: {again:.2f} s (medians of "
        f"{asked.repeats})"
    )


if __name__ == "__main__":
    main()
