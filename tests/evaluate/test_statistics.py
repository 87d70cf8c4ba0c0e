from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from anchored.evaluate.statistics import improvement, score


def test_interval_of_a_score_agrees_with_scipy() -> None:
    grades = np.random.default_rng(1).random(240)
    ours = score(grades, resamples=20_000, seed=0)
    theirs = stats.bootstrap(
        (100 * grades,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours.value == pytest.approx(100 * grades.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.15)
    assert ours.high == pytest.approx(theirs.high, abs=0.15)


def test_improvements_are_paired() -> None:
    # the start and the checkpoint differ by exactly one right answer in ten: no spread is left but that one's
    rng = np.random.default_rng(3)
    start = (rng.random(500) < 0.5).astype(float)
    same = improvement(start, np.stack([start, start]), resamples=500, seed=0)
    assert (same.mean.low, same.mean.value, same.mean.high) == (0, 0, 0)
    better = np.where(np.arange(500) % 10 == 0, 1.0, start)
    gain = improvement(start, better[None], resamples=20_000, seed=0)
    theirs = stats.bootstrap(
        (100 * (better - start),), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(4)
    ).confidence_interval
    assert gain.last.low == pytest.approx(theirs.low, abs=0.2)
    assert gain.last.high == pytest.approx(theirs.high, abs=0.2)


def test_max_mean_and_standard_deviation_over_checkpoints() -> None:
    start = np.array([0.0, 0.0, 1.0, 1.0])
    checkpoints = np.array([[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    gain = improvement(start, checkpoints, resamples=200, seed=0)
    assert (gain.max.value, gain.max_checkpoint) == (50.0, 1)
    assert gain.mean.value == pytest.approx((25 + 50 - 25) / 3)
    assert gain.sd == pytest.approx(np.std([25, 50, -25], ddof=1))
    assert gain.last.value == -25


def test_the_interval_of_the_best_of_equal_checkpoints_rarely_leaves_out_no_gain() -> None:
    # 18 checkpoints as good as the start: the best one looks better, and its interval says that this may be chance
    rng = np.random.default_rng(5)
    misses = 0
    for seed in range(100):
        grades = (rng.random((19, 200)) < 0.4).astype(float)
        gain = improvement(grades[0], grades[1:], resamples=300, seed=seed)
        assert gain.max.value >= gain.mean.value
        misses += not gain.max.low <= 0 <= gain.max.high
    assert misses <= 9


def test_the_interval_of_a_single_checkpoint_is_that_of_the_last() -> None:
    rng = np.random.default_rng(6)
    start, only = (rng.random((2, 300)) < 0.5).astype(float)
    gain = improvement(start, only[None], resamples=500, seed=0)
    assert (gain.max.low, gain.max.high) == pytest.approx((gain.last.low, gain.last.high))
