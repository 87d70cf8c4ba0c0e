"""The length-controlled win rate of AlpacaEval 2.0: what a judge would prefer if both answers were equally long.

In: preferences, character lengths and fixed difficulties per instruction, and the benchmark's regression data. Out: a
fitted logistic model, its win rate at equal lengths, and refits on resampled instructions. The model is the official
`length_controlled_v1`: three coefficients, an L1 penalty whose strength cross-validation picks, no intercept.

Shapes: B = fits side by side, N = rows, 3 = coefficients (length, difficulty, model).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
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
MOST_SWEEPS = 1000


@dataclass(frozen=True, slots=True)
class JudgedRows:
    """A model's judged answers, one row per instruction unless `instruction` says otherwise."""

    preference: Float[ndarray, " rows"]
    """1 (the baseline's answer is better) to 2 (the model's is)."""
    gap: Float[ndarray, " rows"]
    """Length of the baseline's answer less that of the model's, in characters."""
    difficulty: Float[ndarray, " rows"]
    instruction: Int[ndarray, " rows"] | None = None
    """Which instruction each row answers, where some are answered several times: its rows weigh as one together, are
    drawn together, and are left out together."""

    def grouped(self) -> Groups:
        """The rows by instruction."""
        if self.instruction is None:
            n = len(self.preference)
            return Groups(np.arange(n), np.arange(n), np.ones(n))
        _, first, of_row, counts = np.unique(
            self.instruction, return_index=True, return_inverse=True, return_counts=True
        )
        return Groups(first, of_row, 1 / counts[of_row])


@dataclass(frozen=True, slots=True)
class Groups:
    """Rows by instruction."""

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
    rows: JudgedRows, gamed: GamedRows | None, c: float, resamples: int, seed: int
) -> Float[ndarray, " resamples"]:
    """Length-controlled win rates, in percent, of models fitted anew to resampled instructions.

    The regression data, the difficulties and `c` stay: they belong to the benchmark. (Resampling the first too and
    choosing `c` anew moves the spread of published models by 0.03 points at most.) Two models with the same
    instructions and seed share each draw, so differences of their results are paired.
    """
    _check(rows)
    n = len(rows.grouped().first)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(float)
    start = length_controlled(rows, gamed, c).weights
    theta = np.array([[start.length, start.difficulty, start.model]])
    return np.concatenate(
        [
            _refit(rows, gamed, c, draws[first : first + REFIT_CHUNK], theta)
            for first in range(0, resamples, REFIT_CHUNK)
        ]
    )


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
    design[:, 0, own] = np.tanh(rows.gap / _spread(rows.gap, drawn)[:, None])
    theta = _fit(design, target, weight, 1 / c, np.repeat(start, len(draws), axis=0))
    rates = _logistic(theta[:, 2:] + theta[:, 1:2] * rows.difficulty[groups.first])
    return 100 * (draws * rates).sum(axis=1) / len(groups.first)


def _spread(gap: Float[ndarray, " rows"], weight: Float[ndarray, "B rows"]) -> Float[ndarray, " B"]:
    """Standard deviations of gaps that weigh so much; endless where all are alike, so that lengths tell nothing."""
    total = weight.sum(axis=1)
    mean = weight @ gap / total
    variance = np.maximum(weight @ gap**2 / total - mean**2, 0) * total / (total - 1)
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
    """The fold of each of `n` training rows, as scikit-learn's GroupKFold deals out groups of equal size."""
    fixed = n - len(groups.of_row)
    number = np.concatenate([np.arange(fixed), fixed + groups.of_row])
    return (fixed + len(groups.first) - 1 - number) % FOLDS


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

    A step that moves no row's logit by more than 1 lowers the loss whole; longer ones are shortened so that they do,
    for the logistic loss is self-concordant in the logits (Bach 2010).
    """
    theta = start.copy()
    reach = np.abs(design).max(axis=2)
    for _ in range(MOST_STEPS):
        rates = _logistic((theta[:, None] @ design)[:, 0])
        gradient = (design @ (weight * (rates - target))[..., None])[..., 0]
        curved = weight * rates * (1 - rates)
        hessian = (design * curved[:, None]) @ design.transpose(0, 2, 1)
        step = _quadratic_minimum(theta, gradient, hessian, penalty) - theta
        moved = (np.abs(step) * reach).sum(axis=1)
        shorten = np.where(moved > 1, np.log1p(moved) / np.maximum(moved, 1), 1)
        theta = theta + shorten[:, None] * step
        if moved.max() < 1e-7:  # steps are of second order: what is left is beyond double precision
            return theta
    raise EvaluationError("the length-controlled fit did not converge; please report the annotations that show it")


def _quadratic_minimum(
    theta: Float[ndarray, "B 3"], gradient: Float[ndarray, "B 3"], hessian: Float[ndarray, "B 3 3"], penalty: float
) -> Float[ndarray, "B 3"]:
    """Minimise gradient·d + d·hessian·d / 2 + penalty * |theta + d|_1; returns theta + d.

    Mostly the signs of theta are those of the minimum, and one linear solve gives it; the others go by coordinates.
    """
    sign = np.sign(theta)
    active = sign != 0
    both = active[:, :, None] & active[:, None, :]
    system = np.where(both, hessian, 0) + np.eye(3) * ~active[:, :, None]
    right = np.where(active, -(gradient + penalty * sign), 0)
    with np.errstate(all="ignore"):
        new = theta + _solve3(system, right)
        slope = gradient + (hessian @ (new - theta)[..., None])[..., 0]
        settled = np.where(active, np.sign(new) == sign, np.abs(slope) <= penalty).all(axis=1)
    settled &= np.isfinite(new).all(axis=1)
    if not settled.all():
        rest = ~settled
        new[rest] = _by_coordinates(theta[rest], gradient[rest], hessian[rest], penalty)
    return new


def _solve3(system: Float[ndarray, "B 3 3"], right: Float[ndarray, "B 3"]) -> Float[ndarray, "B 3"]:
    """Solve B systems of 3 equations by cross products; a singular one gives what is not finite."""
    a, b, c = system[:, 0], system[:, 1], system[:, 2]
    bc, ca, ab = np.cross(b, c), np.cross(c, a), np.cross(a, b)
    determinant = (a * bc).sum(axis=1, keepdims=True)
    return (right[:, :1] * bc + right[:, 1:2] * ca + right[:, 2:] * ab) / determinant


def _by_coordinates(
    theta: Float[ndarray, "B 3"], gradient: Float[ndarray, "B 3"], hessian: Float[ndarray, "B 3 3"], penalty: float
) -> Float[ndarray, "B 3"]:
    new = theta.copy()
    # a feature that is 0 in every row curves nothing: the penalty sends it to 0
    curve = np.maximum(np.einsum("bii->bi", hessian), 1e-12)
    for _ in range(MOST_SWEEPS):
        before = new.copy()
        for k in range(3):
            slope = gradient[:, k] + (hessian[:, k] * (new - theta)).sum(axis=1)
            free = new[:, k] - slope / curve[:, k]
            new[:, k] = np.sign(free) * np.maximum(np.abs(free) - penalty / curve[:, k], 0)
        if np.abs(new - before).max() < 1e-12:
            break
    return new


def _logistic(x: ndarray) -> ndarray:
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, small) / (1 + small)


def _standard_error(rates: Float[ndarray, " rows"]) -> float:
    return 100 * float(rates.std(ddof=1)) / len(rates) ** 0.5
