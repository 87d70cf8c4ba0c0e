"""What all rows will cost by the first few: against scipy's interval, drawn costs, and the stage's own bill."""

from __future__ import annotations

from random import Random

import pytest
from scipy import stats

from anchored.create.estimate import Estimate, estimate


def test_the_interval_is_students() -> None:
    random = Random(0)
    for count in (5, 20, 100):
        costs = [random.expovariate(50) for _ in range(count)]
        found = estimate(costs, 1_000_000)
        low, high = stats.t.interval(0.95, count - 1, loc=stats.tmean(costs), scale=stats.sem(costs, ddof=1))
        assert found.usd == pytest.approx(1e6 * stats.tmean(costs))
        assert found.high - found.usd == pytest.approx(1e6 * (high - low) / 2, rel=5e-3)
        assert found.low == pytest.approx(max(0, 2 * found.usd - found.high))


def test_the_interval_holds_what_all_cost_in_nineteen_of_twenty_draws() -> None:
    random = Random(1)
    held = 0
    for _ in range(400):
        costs = [random.gauss(0.02, 0.005) for _ in range(500)]
        found = estimate(costs[:20], 500)
        held += found.low <= sum(costs) <= found.high
    assert 365 <= held <= 393, "380, deviation 4.4"


def test_what_is_all_made_is_known_exactly() -> None:
    found = estimate([0.1, 0.2, 0.4], 3)
    assert (found.low, found.usd, found.high) == pytest.approx((0.7, 0.7, 0.7))


def test_a_budget_that_is_too_small_is_told_with_what_it_is_enough_for() -> None:
    found = Estimate(usd=500, low=450, high=550, rows=32_000, pilot=20)
    told = found.told(spent=0.3125, budget=None)
    assert told == (
        "by the first 20 rows, all 32,000 will cost about 500.00 USD (95 % interval 450.00 USD to 550.00 USD), "
        "of which 0.3125 USD are spent"
    )
    assert found.told(0.3125, 600) == told
    assert found.told(0.3125, 500).endswith(
        "; create.budget_usd, 500.00 USD, may be reached: it is enough for about 32,000 rows"
    )
    assert "100.00 USD, will be reached: it is enough for about 6,400 rows" in found.told(0.3125, 100)
