from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from anchored.evaluate.statistics import (
    Design,
    Interval,
    acceleration,
    corrected,
    design,
    draws,
    improvement,
    interval,
    point,
    resampled_scores,
    score,
)


def test_interval_of_a_score_agrees_with_scipy() -> None:
    grades = np.random.default_rng(1).random(240)
    ours = score(grades, resamples=20_000, seed=0)
    theirs = stats.bootstrap(
        (100 * grades,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours.value == pytest.approx(100 * grades.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.15)
    assert ours.high == pytest.approx(theirs.high, abs=0.15)


@pytest.mark.parametrize("seed", range(3))
def test_a_corrected_interval_is_scipys(seed: int) -> None:
    grades = np.random.default_rng(seed).lognormal(0, 1.5, 60)

    def rate(x: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.log(x.mean(axis=axis))

    theirs = stats.bootstrap((grades,), rate, n_resamples=2000, method="BCa", rng=np.random.default_rng(seed))
    left_out = np.array([rate(np.delete(grades, place)) for place in range(60)])
    ours = corrected(float(rate(grades)), theirs.bootstrap_distribution, acceleration(left_out))
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval))
    plain = interval(float(rate(grades)), theirs.bootstrap_distribution)
    assert abs(ours.high - plain.high) > 0.01


def test_a_corrected_interval_of_what_does_not_vary_is_a_point() -> None:
    assert acceleration(np.full(9, 5.0)) == 0
    assert corrected(5.0, np.array([5.0, np.nan, 5.0]), 0.0) == Interval(5.0, 5.0, 5.0)


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


def clustered(sizes: np.ndarray, decimals: int | None = None) -> Design:
    """Clusters of these sizes, in one stratum."""
    names = [str(cluster) for cluster, size in enumerate(sizes) for _ in range(size)]
    return design(names, [""] * len(names), decimals)


def test_items_that_ask_the_same_say_it_once() -> None:
    grades = np.random.default_rng(7).random(80)
    alone = score(grades, resamples=500, seed=0)
    doubled = score(np.repeat(grades, 3), 500, 0, clustered(np.full(80, 3)))
    assert (doubled.value, doubled.low, doubled.high) == pytest.approx((alone.value, alone.low, alone.high))
    assert score(np.repeat(grades, 3), 500, 0).high - alone.value < 0.7 * (alone.high - alone.value)


def test_the_spread_over_clusters_of_all_sizes_is_the_cluster_robust_one() -> None:
    rng = np.random.default_rng(8)
    sizes = rng.integers(1, 9, 400)
    grades = np.repeat((rng.random(400) < 0.4).astype(float), sizes)
    how = clustered(sizes)
    spread = resampled_scores(grades[None], how, 4000, 0)[:, 0].std(ddof=1)
    residuals = np.bincount(how.strata[0].clusters, grades - grades.mean())
    robust = np.sqrt((residuals**2).sum()) / len(grades)
    assert spread == pytest.approx(robust, rel=0.05)


def test_strata_are_drawn_apart_and_weigh_what_they_hold() -> None:
    # all of one stratum right, all of the other wrong: only a draw across both could move the score
    strata = ["a"] * 30 + ["b"] * 10
    grades = np.array([1.0] * 30 + [0.0] * 10)
    how = design([str(place) for place in range(40)], strata)
    found = score(grades, 300, 0, how)
    assert (found.value, found.low, found.high) == pytest.approx((75, 75, 75))
    # some of a stratum's grades are missing: it weighs what it weighed
    graded = [place < 10 or place >= 30 for place in range(40)]
    how = design([str(place) for place in range(40)], strata, graded=graded)
    assert score(grades[graded], 300, 0, how).value == pytest.approx(75)
    # all of a stratum's are: the other one has the draws that it had
    grades = np.random.default_rng(3).random(40)
    alone = design([str(place) for place in range(40)], strata, graded=[False] * 30 + [True] * 10)
    expected = grades[30:] @ draws(10, 300, 0, 1).T / 10
    assert resampled_scores(grades[None, 30:], alone, 300, 0)[:, 0] == pytest.approx(expected)


def test_paired_gains_are_drawn_by_cluster() -> None:
    rng = np.random.default_rng(9)
    start = np.repeat((rng.random(60) < 0.5).astype(float), 4)
    same = improvement(start, start[None], 300, 0, clustered(np.full(60, 4)))
    assert (same.last.low, same.last.value, same.last.high) == (0, 0, 0)
    better = np.maximum(start, np.repeat((rng.random(60) < 0.3).astype(float), 4))
    alone = improvement(start[::4], better[None, ::4], 300, 0)
    gain = improvement(start, better[None], 300, 0, clustered(np.full(60, 4)))
    assert (gain.last.low, gain.last.high) == pytest.approx((alone.last.low, alone.last.high))


def test_an_official_score_is_rounded_as_official_code_rounds() -> None:
    grades = np.array([0.1, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    how = clustered(np.full(16, 1), decimals=3)
    assert point(grades, how) == round(sum(grades.tolist()) / 16, 3) == 0.013  # numpy's rounding gives 0.012
    assert score(grades, 200, 0, how).value == 1.3


def test_one_thing_asked_says_nothing_about_another() -> None:
    how = clustered(np.array([2]))
    found = score(np.array([1.0, 1.0]), 200, 0, how)
    assert (found.value, found.low, found.high) == (100, 0, 100)
    gain = improvement(np.array([0.0, 0.0]), np.array([[1.0, 1.0]]), 200, 0, how)
    assert (gain.last.value, gain.last.low, gain.last.high) == (100, -100, 100)
    assert gain.max == gain.last


def test_the_interval_over_clusters_holds_the_truth_as_often_as_it_says() -> None:
    # clusters of 1 to 8 equal items, as MixEval-Hard has them; the truth is 0.4
    rng = np.random.default_rng(10)
    sizes = np.repeat(np.arange(1, 9), 15)
    how, held, naively = clustered(sizes), 0, 0
    for seed in range(150):
        grades = np.repeat((rng.random(len(sizes)) < 0.4).astype(float), sizes)
        found, naive = score(grades, 300, seed, how), score(grades, 300, seed)
        held += found.low <= 40 <= found.high
        naively += naive.low <= 40 <= naive.high
    assert held >= 133  # 89 %; the expected 142 has a standard deviation of 3
    assert naively < 115


@pytest.mark.filterwarnings("ignore:All-NaN")
@pytest.mark.parametrize(
    ("value", "resampled", "lean"),
    [
        (50.0, np.full(5, np.nan), 0.0),
        (500.0, np.arange(100.0), 0.4),
        (-5.0, np.arange(100.0), 0.4),
        (98.9, np.arange(100.0), 0.9),
    ],
)
def test_what_has_no_bias_that_can_be_told_has_plain_percentiles(
    value: float, resampled: np.ndarray, lean: float
) -> None:
    found, plain = corrected(value, resampled, lean), interval(value, resampled)
    assert (found.value, found.low, found.high) == pytest.approx((plain.value, plain.low, plain.high), nan_ok=True)
