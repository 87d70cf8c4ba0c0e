"""The length-controlled win rate of AlpacaEval 2.0: what a judge would prefer if both answers were equally long.

In: preferences, character lengths and fixed difficulties per instruction, and the benchmark's regression data. Out: a
fitted logistic model, its win rate at equal lengths, and refits on resampled instructions. The model is the official
`length_controlled_v1`: three coefficients, an L1 penalty whose strength cross-validation picks, no intercept.

Shapes: B = fits side by side, N = rows, 3 = coefficients (length, difficulty, model).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from anchored.errors import EvaluationError
from anchored.evaluate.preference import check_preferences

GRID = np.logspace(-4, 4, 10)
"""The values of C, the inverse strength of the penalty, that cross-validation tries."""
FOLDS = 5
GAMED_WEIGHT = 0.2 / 2
"""Of each row of the regression data; a model's own rows weigh 1."""
REFIT_CHUNK = 64
MOST_STEPS = 100
MOST_HALVINGS = 60


@dataclass(frozen=True, slots=True)
class JudgedRows:
    """A model's judged answers."""

    preference: Float[ndarray, " rows"]
    """1 (the baseline's answer is better) to 2 (the model's is)."""
    gap: Float[ndarray, " rows"]
    """Length of the baseline's answer less that of the model's, in characters."""
    difficulty: Float[ndarray, " rows"]
    instruction: Int[ndarray, " rows"] | None = None
    """Which of the benchmark's instructions each row answers; None: all, in their order. One that is answered several
    times weighs as one, and its rows are drawn together and left out together."""

    def grouped(self) -> Groups:
        """The rows by instruction, in the benchmark's order."""
        of_rows = np.arange(len(self.preference)) if self.instruction is None else self.instruction
        number, first, of_row, counts = np.unique(of_rows, return_index=True, return_inverse=True, return_counts=True)
        return Groups(number, first, of_row, 1 / counts[of_row])


@dataclass(frozen=True, slots=True)
class Groups:
    """Rows by instruction."""

    number: Int[ndarray, " instructions"]
    """Which of the benchmark's it is, ascending."""
    first: Int[ndarray, " instructions"]
    """A row of each."""
    of_row: Int[ndarray, " rows"]
    """The place of each row's instruction among them."""
    weight: Float[ndarray, " rows"]
    """1 over the rows of the same instruction."""


@dataclass(frozen=True, slots=True)
class GamedRows:
    """The benchmark's regression data: the baseline model told to be concise, and to be verbose, judged against itself.

    They say what length alone does to a preference.
    """

    preference: Float[ndarray, " rows"]
    """0 to 1."""
    std_gap: Float[ndarray, " rows"]
    """Gap over its standard deviation."""
    difficulty: Float[ndarray, " rows"]
    instruction: Int[ndarray, " rows"] | None = None
    """Which of the benchmark's instructions each row answers; None: not known, and no resample draws them anew."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The coefficients of a model."""

    length: float
    difficulty: float
    model: float


@dataclass(frozen=True, slots=True)
class LengthControlled:
    """A fitted model's win rate at equal lengths, in percent."""

    win_rate: float
    standard_error: float
    """The official one, over instructions; it leaves out that the fit is uncertain (`refit` does not)."""
    weights: Weights
    c: float


def length_controlled(rows: JudgedRows, gamed: GamedRows | None, c: float | None = None) -> LengthControlled:
    """Fit the official model to a model's rows; `c` where given, else the value that cross-validation picks.

    Without regression data (`gamed` is None) it is the package's `length_controlled_noreg`, which may be far off.
    Raises EvaluationError where a preference is no number from 1 to 2, or no answer differs in length.
    """
    _check(rows)
    design, target, weight = _training_rows(rows, gamed)
    groups = rows.grouped()
    chosen = _cross_validated(design, target, weight, _folds(groups, len(target))) if c is None else c
    theta = _fit(design[None], target, weight[None], 1 / chosen, np.zeros((1, 3)))[0]
    weights = Weights(*map(float, theta))
    rates = predicted(weights, rows.difficulty[groups.first])
    return LengthControlled(100 * float(rates.mean()), _standard_error(rates), weights, float(chosen))


def predicted(
    weights: Weights, difficulty: Float[ndarray, " rows"], baseline: Weights | None = None
) -> Float[ndarray, " rows"]:
    """How likely the model wins each instruction at equal lengths, against the baseline or another model."""
    base = baseline or Weights(0, 0, 0)
    return _logistic((weights.model - base.model) + (weights.difficulty - base.difficulty) * difficulty)


def refit(
    rows: JudgedRows, gamed: GamedRows | None, c: float, draws: Int[ndarray, "resamples instructions"]
) -> Float[ndarray, " resamples"]:
    """Length-controlled win rates, in percent, of models fitted anew to resampled instructions.

    `draws` says how often each of the rows' instructions is in each resample (`statistics.draws`); NaN where none is.
    An instruction's regression data come and go with it, for another one would have had others. Difficulties and `c`
    stay. Two models with the same instructions and draws have paired results.
    """
    _check(rows)
    start = length_controlled(rows, gamed, c).weights
    theta = np.array([[start.length, start.difficulty, start.model]])
    some = np.asarray(draws.sum(axis=1) > 0)
    drawn = np.where(some[:, None], draws, 1).astype(float)
    rates = [
        _refit(rows, gamed, c, drawn[first : first + REFIT_CHUNK], theta) for first in range(0, len(drawn), REFIT_CHUNK)
    ]
    return np.where(some, np.concatenate(rates), np.nan)


def _refit(
    rows: JudgedRows,
    gamed: GamedRows | None,
    c: float,
    draws: Float[ndarray, "B instructions"],
    start: Float[ndarray, "1 3"],
) -> Float[ndarray, " B"]:
    groups = rows.grouped()
    drawn = draws[:, groups.of_row] * groups.weight
    once, target, once_weight = _training_rows(rows, gamed)
    design = np.repeat(once[None], len(draws), axis=0)
    weight = np.repeat(once_weight[None], len(draws), axis=0)
    own = slice(len(target) - len(rows.gap), None)
    weight[:, own] = drawn
    if gamed is not None and gamed.instruction is not None:
        answered = np.flatnonzero(np.isin(gamed.instruction, groups.number))
        weight[:, answered] *= draws[:, np.searchsorted(groups.number, gamed.instruction[answered])]
    design[:, 0, own] = np.tanh(rows.gap / _spread(rows.gap, drawn)[:, None])
    theta = _fit(design, target, weight, 1 / c, np.repeat(start, len(draws), axis=0))
    rates = _logistic(theta[:, 2:] + theta[:, 1:2] * rows.difficulty[groups.first])
    return 100 * (draws * rates).sum(axis=1) / draws.sum(axis=1)


def _spread(gap: Float[ndarray, " rows"], weight: Float[ndarray, "B rows"]) -> Float[ndarray, " B"]:
    """Standard deviations of gaps that weigh so much; endless where all are alike, so that lengths tell nothing."""
    total = weight.sum(axis=1)
    mean = weight @ gap / total
    variance = np.maximum(weight @ gap**2 / total - mean**2, 0) * total / np.maximum(total - 1, 1e-9)
    return np.where(variance > 1e-13 * (gap**2).max(), np.sqrt(variance), np.inf)


def _check(rows: JudgedRows) -> None:
    check_preferences(rows.preference)
    n = len(rows.grouped().first)
    if n < FOLDS:
        raise EvaluationError(f"{n} judged instructions are too few to control for length; {FOLDS} are the least")
    if rows.gap.any() and np.ptp(rows.gap) == 0:
        raise EvaluationError(
            f"every answer is {abs(int(rows.gap[0]))} characters from the baseline's length: what length does cannot "
            "be told from what the model does; look at the outputs"
        )


def _training_rows(
    rows: JudgedRows, gamed: GamedRows | None
) -> tuple[Float[ndarray, "3 N"], Float[ndarray, " N"], Float[ndarray, " N"]]:
    """Design, targets in 0..1 and weights; the model's rows come last."""
    target, weight = rows.preference - 1, rows.grouped().weight
    design = np.stack([np.tanh(rows.gap / _spread(rows.gap, weight[None])[0]), rows.difficulty, np.ones(len(rows.gap))])
    if gamed is None:
        return design, target, weight
    fixed = np.stack([np.tanh(gamed.std_gap), gamed.difficulty, np.zeros(len(gamed.std_gap))])
    return (
        np.concatenate([fixed, design], axis=1),
        np.concatenate([gamed.preference, target]),
        np.concatenate([np.full(len(gamed.std_gap), GAMED_WEIGHT), weight]),
    )


def _folds(groups: Groups, n: int) -> Int[ndarray, " N"]:
    """The fold of each of `n` training rows: dealt out in turn, as scikit-learn's GroupKFold does with equal groups."""
    fixed = n - len(groups.of_row)
    number = np.concatenate([np.arange(fixed), fixed + groups.of_row])
    return number % FOLDS


def _cross_validated(
    design: Float[ndarray, "3 N"], target: Float[ndarray, " N"], weight: Float[ndarray, " N"], fold: Int[ndarray, " N"]
) -> float:
    """The value of C with the best mean weighted log-likelihood of rows that were left out; the smallest of equals."""
    held_out = fold == np.arange(FOLDS)[:, None]
    theta = np.zeros((FOLDS, 3))
    scores = []
    for c in GRID:
        theta = _fit(design[None], target, weight * ~held_out, 1 / c, theta)
        rates = np.clip(_logistic(theta @ design), 1e-15, 1 - 1e-15)
        likelihood = weight * (target * np.log(rates) + (1 - target) * np.log1p(-rates))
        scores.append(np.mean((likelihood * held_out).sum(axis=1) / held_out.sum(axis=1)))
    return float(GRID[int(np.argmax(scores))])


def _fit(
    design: Float[ndarray, "B 3 N"] | Float[ndarray, "1 3 N"],
    target: Float[ndarray, " N"],
    weight: Float[ndarray, "B N"],
    penalty: float,
    start: Float[ndarray, "B 3"],
) -> Float[ndarray, "B 3"]:
    """Minimise sum(weight * log-loss) + penalty * |theta|_1 for each of B, by proximal Newton steps.

    A step that moves no row's logit by more than 1 lowers the loss, which is self-concordant in the logits (Bach 2010);
    a longer one is halved until it does.
    """
    theta = start.copy()
    reach = np.abs(design).max(axis=2)
    for _ in range(MOST_STEPS):
        rates = _logistic((theta[:, None] @ design)[:, 0])
        gradient = (design @ (weight * (rates - target))[..., None])[..., 0]
        curved = weight * rates * (1 - rates)
        hessian = (design * curved[:, None]) @ design.transpose(0, 2, 1)
        step = _quadratic_minimum(theta, gradient, hessian, penalty) - theta
        # where length and model cannot be told apart, many minima are equal: the first one found stays
        step[_is_minimum(theta, gradient, penalty)] = 0
        moved = (np.abs(step) * reach).sum(axis=1)
        promised = (gradient * step).sum(axis=1) + penalty * (np.abs(theta + step) - np.abs(theta)).sum(axis=1)
        if moved.max() > 1:

            def value(at: Float[ndarray, "B 3"]) -> Float[ndarray, " B"]:
                logits = (at[:, None] @ design)[:, 0]
                loss = weight * (np.logaddexp(0, logits) - target * logits)
                return loss.sum(axis=1) + penalty * np.abs(at).sum(axis=1)

            step = _shortened(value, theta, step, promised, moved > 1)
        theta = theta + step
        # steps are of second order: after such a one, what is left is beyond double precision
        if np.all((moved < 1e-7) | (promised > -1e-12)):
            return theta
    raise EvaluationError("the length-controlled fit did not converge; please report the annotations that show it")


def _is_minimum(theta: Float[ndarray, "B 3"], gradient: Float[ndarray, "B 3"], penalty: float) -> Bool[ndarray, " B"]:
    pull = np.where(theta != 0, np.abs(gradient + penalty * np.sign(theta)), np.abs(gradient) - penalty)
    return pull.max(axis=1) < 1e-9


def _shortened(
    value: Callable[[Float[ndarray, "B 3"]], Float[ndarray, " B"]],
    theta: Float[ndarray, "B 3"],
    step: Float[ndarray, "B 3"],
    promised: Float[ndarray, " B"],
    doubtful: Bool[ndarray, " B"],
) -> Float[ndarray, "B 3"]:
    """The steps, doubtful ones halved until they keep a quarter of what the slope promises."""
    size = np.ones((len(step), 1))
    begin = value(theta)
    for _ in range(MOST_HALVINGS):
        worse = doubtful & (value(theta + size * step) > begin + 0.25 * size[:, 0] * promised + 1e-12 * np.abs(begin))
        if not worse.any():
            break
        size[worse] /= 2
    return size * step


def _quadratic_minimum(
    theta: Float[ndarray, "B 3"], gradient: Float[ndarray, "B 3"], hessian: Float[ndarray, "B 3 3"], penalty: float
) -> Float[ndarray, "B 3"]:
    """Minimise gradient·d + d·hessian·d / 2 + penalty * |theta + d|_1; returns theta + d.

    Mostly the signs of theta are those of the minimum, and one linear solve gives it; else all 27 patterns are tried.
    """
    sign = np.sign(theta)
    active = sign != 0
    new = _minimum_of_signs(theta, gradient, hessian, penalty, sign)
    with np.errstate(all="ignore"):
        slope = gradient + (hessian @ (new - theta)[..., None])[..., 0]
        settled = np.where(active, np.sign(new) == sign, np.abs(slope) <= penalty).all(axis=1)
    settled &= np.isfinite(new).all(axis=1)
    if not settled.all():
        rest = ~settled
        new[rest] = _best_of_all_signs(theta[rest], gradient[rest], hessian[rest], penalty)
    return new


def _best_of_all_signs(
    theta: Float[ndarray, "B 3"], gradient: Float[ndarray, "B 3"], hessian: Float[ndarray, "B 3 3"], penalty: float
) -> Float[ndarray, "B 3"]:
    """The minimum is that of its own signs, where they come out as supposed; all that do are candidates."""
    best = np.zeros_like(theta)
    lowest = np.full(len(theta), np.inf)
    for signs in itertools.product((0.0, 1.0, -1.0), repeat=3):
        sign = np.broadcast_to(signs, theta.shape)
        new = _minimum_of_signs(theta, gradient, hessian, penalty, sign)
        with np.errstate(all="ignore"):
            step = new - theta
            value = ((gradient + (hessian @ step[..., None])[..., 0] / 2) * step).sum(axis=1)
            value += penalty * np.abs(new).sum(axis=1)
            better = (new * sign >= 0).all(axis=1) & (value < lowest)
        best[better], lowest[better] = new[better], value[better]
    return best


def _minimum_of_signs(
    theta: Float[ndarray, "B 3"],
    gradient: Float[ndarray, "B 3"],
    hessian: Float[ndarray, "B 3 3"],
    penalty: float,
    sign: Float[ndarray, "B 3"],
) -> Float[ndarray, "B 3"]:
    """The minimum if the penalty were penalty * sign·theta, with what has sign 0 held at 0; not finite if singular."""
    active = sign != 0
    system = np.where(active[:, :, None] & active[:, None, :], hessian, 0) + np.eye(3) * ~active[:, :, None]
    # what is held at 0 moves there from theta, and pulls at the others
    held = np.where(active, 0, -theta)
    right = np.where(active, -(gradient + (hessian @ held[..., None])[..., 0] + penalty * sign), held)
    a, b, c = system[:, 0], system[:, 1], system[:, 2]
    bc, ca, ab = np.cross(b, c), np.cross(c, a), np.cross(a, b)
    with np.errstate(all="ignore"):
        determinant = (a * bc).sum(axis=1, keepdims=True)
        step = (right[:, :1] * bc + right[:, 1:2] * ca + right[:, 2:] * ab) / determinant
    return np.where(active, theta + step, 0)


def _logistic(x: ndarray) -> ndarray:
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, small) / (1 + small)


def _standard_error(rates: Float[ndarray, " rows"]) -> float:
    return 100 * float(rates.std(ddof=1)) / len(rates) ** 0.5
