from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy import optimize

from anchored.errors import EvaluationError
from anchored.evaluate import statistics
from anchored.evaluate.length_control import (
    GRID,
    GamedRows,
    JudgedRows,
    Weights,
    _quadratic_minimum,
    length_controlled,
    predicted,
    refit,
)


def rows(n: int = 150, seed: int = 0) -> JudgedRows:
    """Preferences that favour long answers."""
    rng = np.random.default_rng(seed)
    gap, difficulty = rng.normal(200, 700, n).round(), rng.normal(0, 1, n)
    logit = -0.9 * np.tanh(gap / gap.std()) + 0.5 * difficulty - 0.3 + rng.normal(0, 1, n)
    return JudgedRows(1 + 1 / (1 + np.exp(-logit)), gap, difficulty)


def gamed(n: int = 150, seed: int = 1) -> GamedRows:
    rng = np.random.default_rng(seed)
    std_gap, difficulty = rng.normal(0, 1, 2 * n), np.tile(rows(n).difficulty, 2)
    return GamedRows(1 / (1 + np.exp(1.5 * np.tanh(std_gap) + rng.normal(0, 1, 2 * n))), std_gap, difficulty)


def plain(
    judged: JudgedRows, extra: GamedRows | None, c: float, keep: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The official objective, written down and minimised with scipy: the coefficients, and each row's log-likelihood.

    `keep` says which rows are fitted. |theta| is smooth in two parts that are not negative.
    """
    gap = judged.gap / np.std(judged.gap, ddof=1)
    table = [
        [np.tanh(g), d, 1.0, p - 1, 1.0] for g, d, p in zip(gap, judged.difficulty, judged.preference, strict=True)
    ]
    if extra is not None:
        more = zip(extra.std_gap, extra.difficulty, extra.preference, strict=True)
        table = [[np.tanh(g), d, 0.0, p, 0.1] for g, d, p in more] + table
    x, y, w = np.array(table)[:, :3], np.array(table)[:, 3], np.array(table)[:, 4]
    fitted = w if keep is None else w * keep

    def value(parts: np.ndarray) -> tuple[float, np.ndarray]:
        eta = x @ (parts[:3] - parts[3:])
        loss = fitted @ (np.logaddexp(0, eta) - y * eta) + parts.sum() / c
        slope = x.T @ (fitted * (1 / (1 + np.exp(-eta)) - y))
        return loss, np.concatenate([slope, -slope]) + 1 / c

    bounds = [(0, None)] * 6
    found = optimize.minimize(
        value, np.zeros(6), jac=True, method="SLSQP", bounds=bounds, options={"ftol": 1e-15, "maxiter": 1000}
    )
    theta = found.x[:3] - found.x[3:]
    eta = x @ theta
    return theta, w * (y * eta - np.logaddexp(0, eta))


@pytest.mark.parametrize("c", [0.001, 0.01, 0.03, 0.1, 1.0, 100.0, 1e4])
@pytest.mark.parametrize("with_gamed", [True, False])
def test_the_fit_minimises_the_official_objective(c: float, with_gamed: bool) -> None:
    extra = gamed() if with_gamed else None
    theta, _ = plain(rows(), extra, c)
    fit = length_controlled(rows(), extra, c)
    got = [fit.weights.length, fit.weights.difficulty, fit.weights.model]
    assert got == pytest.approx(theta, abs=2e-5)
    assert [value == 0 for value in got] == [abs(value) < 1e-7 for value in theta]
    rates = 1 / (1 + np.exp(-(theta[2] + theta[1] * rows().difficulty)))
    assert fit.win_rate == pytest.approx(100 * rates.mean(), abs=1e-3)
    assert fit.standard_error == pytest.approx(100 * rates.std(ddof=1) / 150**0.5, abs=1e-3)


@pytest.mark.parametrize("seed", [0, 2, 3])
def test_cross_validation_picks_the_c_that_a_plain_loop_picks(seed: int) -> None:
    judged, extra = rows(60, seed), gamed(60)
    total = 180
    scores = []
    for c in GRID:
        of_folds = []
        for fold in range(5):
            out = np.array([(total - 1 - row) % 5 == fold for row in range(total)])
            of_folds.append(plain(judged, extra, c, ~out)[1][out].mean())
        scores.append(np.mean(of_folds))
    assert max(scores) - min(scores) > 0.01
    # the largest values of C are as good as each other to scipy's precision
    assert scores[list(GRID).index(length_controlled(judged, extra).c)] == pytest.approx(max(scores), abs=1e-7)


def test_without_lengths_and_difficulties_it_is_the_win_rate() -> None:
    # nothing but the model's own term is left, whose likelihood is highest where it predicts the mean
    judged = JudgedRows(rows().preference, np.zeros(150), np.zeros(150))
    fit = length_controlled(judged, None, 1e8)
    assert fit.win_rate == pytest.approx(100 * (judged.preference.mean() - 1), abs=1e-5)
    assert (fit.weights.length, fit.weights.difficulty) == (0, 0)


def test_control_takes_away_what_length_gave() -> None:
    rng = np.random.default_rng(4)
    gap = rng.normal(-500, 400, 4000)
    rate = 1 / (1 + np.exp(1.2 * np.tanh(gap / gap.std(ddof=1))))
    judged = JudgedRows(1 + rate, gap, rng.normal(0, 1, 4000))
    assert judged.preference.mean() - 1 > 0.65
    assert length_controlled(judged, None).win_rate == pytest.approx(50, abs=0.05)


def test_a_refit_is_a_fit_to_the_rows_that_were_drawn() -> None:
    judged, extra = rows(), gamed()
    got = refit(judged, extra, 2.8, statistics.draws(150, 150, seed=5))
    draws = np.random.default_rng(5).multinomial(150, np.full(150, 1 / 150), size=150)
    for k in (0, 63, 64, 149):
        drawn = np.repeat(np.arange(150), draws[k])
        literal = JudgedRows(judged.preference[drawn], judged.gap[drawn], judged.difficulty[drawn])
        assert got[k] == pytest.approx(length_controlled(literal, extra, 2.8).win_rate, abs=1e-6)


def test_regression_data_come_and_go_with_their_instruction() -> None:
    judged, extra = rows(), gamed()
    # the model has answers to instructions 30 to 179, and the regression data are of 0 to 149, with some left out
    answered = replace(judged, instruction=np.arange(30, 180))
    of = np.random.default_rng(3).permutation(len(extra.std_gap)) % 150
    known = replace(extra, instruction=of)
    draws = statistics.draws(150, 70, 5)
    got = refit(answered, known, 2.8, draws)
    for k in (0, 63, 64, 69):
        drawn = np.repeat(np.arange(150), draws[k])
        literal = JudgedRows(judged.preference[drawn], judged.gap[drawn], judged.difficulty[drawn])
        kept = np.concatenate([np.flatnonzero(of < 30), *(np.flatnonzero(of == 30 + place) for place in drawn)])
        going = GamedRows(extra.preference[kept], extra.std_gap[kept], extra.difficulty[kept])
        assert got[k] == pytest.approx(length_controlled(literal, going, 2.8).win_rate, abs=1e-6)
    assert not np.allclose(got, refit(answered, extra, 2.8, draws), atol=1e-3)


def test_rows_of_one_instruction_weigh_as_one_and_go_together() -> None:
    judged, extra = rows(), gamed()
    order = np.random.default_rng(6).permutation(np.tile(np.arange(150), 3))
    thrice = JudgedRows(judged.preference[order], judged.gap[order], judged.difficulty[order], order + 1000)
    one, other = length_controlled(judged, extra), length_controlled(thrice, extra)
    assert (other.win_rate, other.standard_error) == pytest.approx((one.win_rate, one.standard_error), abs=1e-6)
    assert other.c == one.c
    draws = statistics.draws(150, 70, 0)
    assert refit(thrice, extra, 2.8, draws) == pytest.approx(refit(judged, extra, 2.8, draws), abs=1e-6)


def test_an_instruction_that_was_answered_twice_counts_half_each_time() -> None:
    judged = rows(40)
    which = np.concatenate([np.arange(40), np.arange(20)])
    twice = JudgedRows(
        np.concatenate([judged.preference, 3 - judged.preference[:20]]),
        np.concatenate([judged.gap, 90 - judged.gap[:20]]),
        judged.difficulty[which],
        which,
    )
    weight = np.where(which < 20, 0.5, 1.0)
    mean = (weight * twice.gap).sum() / 40
    gap = twice.gap / ((weight * (twice.gap - mean) ** 2).sum() / 39) ** 0.5
    x = np.stack([np.tanh(gap), twice.difficulty, np.ones(60)], axis=1)
    y = twice.preference - 1

    def value(parts: np.ndarray) -> float:
        eta = x @ (parts[:3] - parts[3:])
        return float(weight @ (np.logaddexp(0, eta) - y * eta) + parts.sum() / 3)

    found = optimize.minimize(value, np.zeros(6), method="SLSQP", bounds=[(0, None)] * 6, options={"ftol": 1e-14})
    fit = length_controlled(twice, None, 3)
    got = [fit.weights.length, fit.weights.difficulty, fit.weights.model]
    assert got == pytest.approx(found.x[:3] - found.x[3:], abs=1e-4)


def test_refits_spread_as_new_samples_do() -> None:
    fresh = [length_controlled(rows(300, seed), gamed(), 2.8).win_rate for seed in range(10, 210)]
    spread = [refit(rows(300, seed), gamed(), 2.8, statistics.draws(300, 200, seed)).std() for seed in range(10, 20)]
    assert np.mean(spread) == pytest.approx(np.std(fresh), rel=0.2)


def test_refits_of_two_models_share_their_draws() -> None:
    # a model that is a little better everywhere: the difference is far surer than either rate
    judged = rows(300)
    better = JudgedRows(np.minimum(judged.preference + 0.02, 2), judged.gap, judged.difficulty)
    one, other = (refit(model, gamed(), 2.8, statistics.draws(300, 300, 0)) for model in (judged, better))
    assert (other - one).std() < one.std() / 10


@pytest.mark.parametrize("preference", [1.0, 2.0])
def test_a_model_that_always_wins_or_loses_is_fitted(preference: float) -> None:
    judged = JudgedRows(np.full(150, preference), rows().gap, rows().difficulty)
    fit = length_controlled(judged, None)
    assert abs(fit.win_rate - 100 * (preference - 1)) < 1
    assert np.isfinite(refit(judged, None, fit.c, statistics.draws(150, 50, 0))).all()


@pytest.mark.parametrize("spread", [0.3, 3000.0])
@pytest.mark.parametrize("outlier", [0.0, 1e6])
@pytest.mark.parametrize("kind", ["all or nothing", "by length", "one win"])
@pytest.mark.parametrize("seed", [0, 4, 16])
def test_hard_cases_are_fitted_as_well(spread: float, outlier: float, kind: str, seed: int) -> None:
    # a length that says all, or nothing; logits that run away; lengths that cannot be told from the model
    rng = np.random.default_rng(seed)
    gap = -2000 + rng.normal(0, spread, 60)
    gap[0] += outlier
    won = {
        "all or nothing": rng.random(60) < 0.5,
        "by length": gap < np.median(gap),
        "one win": np.arange(60) == 3,
    }[kind]
    judged = JudgedRows(1 + won.astype(float), gap, rng.normal(0, 3, 60))
    for extra, c in itertools.product((None, gamed()), (None, 1e4)):
        fit = length_controlled(judged, extra, c)
        assert 0 <= fit.win_rate <= 100
        again = refit(judged, extra, fit.c, statistics.draws(60, 20, 0))
        assert ((again >= 0) & (again <= 100)).all()


def test_a_step_ends_where_no_direction_goes_down() -> None:
    # the minimum of gradient·d + d·hessian·d / 2 + penalty * |theta + d|_1, by its conditions
    rng = np.random.default_rng(8)
    count = 3000
    theta = rng.normal(0, 1, (count, 3)) * (rng.random((count, 3)) < 0.6)
    roots = rng.normal(0, 1, (count, 3, 3)) * 10 ** rng.uniform(-1, 1, (count, 1, 3))
    hessian, gradient, penalty = roots @ roots.transpose(0, 2, 1) + 0.1 * np.eye(3), rng.normal(0, 2, (count, 3)), 0.8
    new = _quadratic_minimum(theta, gradient, hessian, penalty)
    slope = gradient + (hessian @ (new - theta)[..., None])[..., 0]
    off = np.where(new != 0, np.abs(slope + penalty * np.sign(new)), np.maximum(np.abs(slope) - penalty, 0))
    assert off.max() < 1e-8
    assert 0.1 < (new == 0).mean() < 0.9


def test_rates_against_another_model_are_of_the_difference() -> None:
    one, other = Weights(0.1, 0.9, 0.5), Weights(-0.4, 0.6, 0.1)
    got = predicted(one, np.array([0.0, 2.0]), other)
    assert got == pytest.approx([1 / (1 + np.exp(-0.4)), 1 / (1 + np.exp(-1.0))])
    assert predicted(one, np.zeros(3), one) == pytest.approx([0.5, 0.5, 0.5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preference": np.full(150, np.nan)}, r"150 of 150 preferences are not from 1 to 2 \(row 0: nan\)"),
        ({"preference": np.where(np.arange(150) == 7, 2.5, 1.5)}, r"1 of 150 .*row 7: 2\.5"),
        ({"gap": np.full(150, -30.0)}, "every answer is 30 characters from the baseline's length"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(change: dict[str, np.ndarray], message: str) -> None:
    judged = JudgedRows(**{**{name: getattr(rows(), name) for name in ("preference", "gap", "difficulty")}, **change})
    with pytest.raises(EvaluationError, match=message):
        length_controlled(judged, gamed())
    with pytest.raises(EvaluationError, match=message):
        refit(judged, gamed(), 1.0, statistics.draws(150, 10, 0))


def test_too_few_rows_are_named() -> None:
    few = JudgedRows(np.full(4, 1.5), np.arange(4.0), np.zeros(4))
    with pytest.raises(EvaluationError, match="4 judged instructions are too few"):
        length_controlled(few, gamed())
