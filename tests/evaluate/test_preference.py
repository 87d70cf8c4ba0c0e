from __future__ import annotations

import math

import numpy as np
import pytest

from anchored.errors import EvaluationError
from anchored.evaluate.preference import for_the_second, from_logprobs, from_text, is_switched, win_rate


@pytest.mark.parametrize(
    ("tokens", "preference"),
    [
        ({"m": math.log(0.2), "M": math.log(0.6), "The": math.log(0.2)}, 1.75),
        ({"m": math.log(0.5), "M": math.log(0.5)}, 1.5),
        ({"M": -0.1, "Model": -3.0}, 2.0),
        ({"m": -9.0, " M": -0.1, "The": -4.0}, 1.0),
        ({"m": -9999.0, "M": 0.0}, 2.0),
        ({"m": 0.0, "M": -9999.0}, 1.0),
        ({"m": -math.inf, "M": 0.0}, 2.0),
        ({"m": math.nan, "M": -1.0}, 2.0),
        ({"The": -0.1, "Both": -3.0}, None),
        ({"m": -math.inf, "M": math.nan}, None),
        ({}, None),
    ],
)
def test_log_probabilities_give_a_preference(tokens: dict[str, float], preference: float | None) -> None:
    assert from_logprobs(tokens) == (preference if preference is None else pytest.approx(preference, abs=1e-12))


@pytest.mark.parametrize(
    ("text", "preference"),
    [
        ("m", 1.0),
        ("M", 2.0),
        (" **M**.\n", 2.0),
        ('"m"', 1.0),
        ("Both are fine, m is shorter, but M has the facts.\n\nM", 2.0),
        ("The best model is M", None),
        ("mM", None),
        ("m or M", None),
        ("Μ", None),  # a Greek letter
        ("Beide Antworten sind gut.", None),
        ("", None),
        ("...", None),
    ],
)
def test_a_reply_that_names_one_answer_gives_a_preference(text: str, preference: float | None) -> None:
    assert from_text(text) == preference


def test_the_order_is_drawn_per_instruction_and_read_back() -> None:
    drawn = [is_switched(f"instruction {k}") for k in range(2000)]
    assert 900 < sum(drawn) < 1100
    # what `alpaca_eval` 0.6.6 draws (tests/real has 805 recorded draws of one model)
    assert [is_switched(text) for text in ("What are the names of some famous actors?", "", "Hi")] == [0, 0, 1]
    assert [is_switched(f"instruction {k}", seed=1) for k in range(2000)] != drawn
    assert (for_the_second(1.2, False), for_the_second(1.2, True)) == (1.2, pytest.approx(1.8))


def test_rates_of_a_few_preferences() -> None:
    rates = win_rate(np.array([2.0, 1.0, 1.5, 1.9]))
    assert rates.win_rate == pytest.approx(60)
    assert rates.discrete_win_rate == 62.5
    assert (rates.wins, rates.losses, rates.draws) == (2, 1, 1)
    assert rates.standard_error == pytest.approx(100 * np.std([1, 0, 0.5, 0.9], ddof=1) / 2)


def test_a_single_preference_has_no_error() -> None:
    assert math.isnan(win_rate(np.array([2.0])).standard_error)


@pytest.mark.parametrize("preferences", [[], [1.5, math.nan], [0.0, 1.0], [3.0]])
def test_what_is_no_preference_is_not_scored(preferences: list[float]) -> None:
    with pytest.raises(EvaluationError):
        win_rate(np.array(preferences))
