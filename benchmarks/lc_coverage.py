"""How often the 95 % interval of AlpacaEval's length-controlled win rate holds what endless instructions would give.

    OMP_NUM_THREADS=1 python benchmarks/lc_coverage.py [--trials 1000] [--resamples 1000]

Each trial draws 805 instructions anew, with the model's answers to them and their regression data, which have the
spread of published ones; half the time the model is a weak one, whose rates are skewed. Beside the interval stand
plain percentiles of the same refits, and of refits that keep the regression data as they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from lc_speed import INSTRUCTIONS, make_gamed, make_rows

from anchored.evaluate.alpaca_score import length_controlled_rates
from anchored.evaluate.length_control import GamedRows, JudgedRows, length_controlled, refit
from anchored.evaluate.statistics import draws, interval

ENDLESS = 250


def make(rng: np.random.Generator, weaker: float) -> tuple[JudgedRows, GamedRows]:
    """The benchmark's size of instructions; `weaker` is taken off the model's logits."""
    difficulty = rng.normal(0, 1.3, INSTRUCTIONS)
    rows = make_rows(rng, difficulty)
    odds = (rows.preference - 1) / (2 - rows.preference) * np.exp(-weaker)
    return replace(rows, preference=1 + odds / (1 + odds)), make_gamed(rng, difficulty)


def truth(weaker: float) -> float:
    """The rate of so many instructions that the penalty and chance are nothing."""
    rng = np.random.default_rng(1)
    own, gamed = zip(*(make(rng, weaker) for _ in range(ENDLESS)), strict=True)
    rows = JudgedRows(*(joined(own, name) for name in ("preference", "gap", "difficulty")))
    data = GamedRows(*(joined(gamed, name) for name in ("preference", "std_gap", "difficulty")))
    return length_controlled(rows, data, 1).win_rate


def joined(parts: Sequence[object], name: str) -> np.ndarray:
    return np.concatenate([getattr(part, name) for part in parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--resamples", type=int, default=1000)
    asked = parser.parse_args()
    for weaker in (0.0, 5.0):
        rate = truth(weaker)
        rng = np.random.default_rng(2)
        held = {"interval": 0, "percentiles": 0, "the same, regression data kept": 0}
        for trial in range(asked.trials):
            rows, gamed = make(rng, weaker)
            drawn = draws(INSTRUCTIONS, asked.resamples, trial)
            found = length_controlled_rates([rows], gamed, drawn)
            value, c = float(found.values[0]), length_controlled(rows, gamed).c
            kept = refit(rows, replace(gamed, instruction=None), c, drawn)
            plain = (interval(value, rates) for rates in (found.resampled[:, 0], kept))
            for how, one in zip(held, (found.interval(0), *plain), strict=True):
                held[how] += one.low <= rate <= one.high
        told = ", ".join(f"{how} {100 * count / asked.trials:.1f} %" for how, count in held.items())
        print(f"at a rate of {rate:.1f} %, of {asked.trials} trials: {told}", flush=True)


if __name__ == "__main__":
    main()
