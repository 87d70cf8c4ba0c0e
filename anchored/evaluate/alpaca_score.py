"""From judged answers to the numbers of AlpacaEval 2.0, each with its interval and with what was not judged.

In: the benchmark's data and annotations of one model. Out: `AlpacaScore`. A row that was not answered or not judged is
counted, and is in no number.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from anchored.errors import EvaluationError
from anchored.evaluate import statistics
from anchored.evaluate.alpaca_files import AlpacaData, Annotation, Instruction, in_order
from anchored.evaluate.length_control import (
    GRID,
    GamedRows,
    JudgedRows,
    LengthControlled,
    Weights,
    length_controlled,
    refit,
)
from anchored.evaluate.preference import WinRate, win_rate
from anchored.evaluate.statistics import Estimate, Improvement, Interval
from anchored.records import Prompt, user_prompt

LEAST_OVERLAP = 0.05
OWN_RATE = LengthControlled(50.0, 0.0, Weights(0, 0, 0), 0.0)
"""Of the baseline against itself: one half, by construction."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """How a model's answers compare in length with the baseline's to the same instructions (the paper's Appendix D)."""

    longer: float
    """Share of answers longer than the baseline's."""
    shorter: float
    shift: float
    """By how many of its standard deviations the mean difference in length lies off 0: above 0 the model's are longer.
    """

    @property
    def extrapolates(self) -> bool:
        """Whether fewer than 1 in 20 answers are as short as the baseline's, or as long."""
        return min(1 - self.longer, 1 - self.shorter) < LEAST_OVERLAP

    @property
    def warning(self) -> str:
        """What to know before trusting the length-controlled rate; "" if nothing."""
        if not self.extrapolates:
            return ""
        side, other = ("longer", "shorter") if self.longer > self.shorter else ("shorter", "longer")
        return (
            f"{max(self.longer, self.shorter):.0%} of the answers are {side} than the baseline's, too few {other} to "
            "tell how they fare at equal lengths: the length-controlled rate extrapolates"
        )


@dataclass(frozen=True, slots=True)
class AlpacaScore:
    """One model on AlpacaEval, judged by one judge."""

    model: str
    baseline: str
    rates: WinRate
    win: Interval
    """The win rate, in percent, with its interval over instructions."""
    controlled: LengthControlled | None
    """None where length cannot be controlled for; `notes` says why."""
    lc: Interval | None
    """The length-controlled win rate, with an interval of refits."""
    overlap: Overlap
    mean_length: float
    """Characters per judged answer."""
    baseline_length: float
    judged: int
    failed: int
    """Answered, but without a verdict: in no number above."""
    missing: int
    """Instructions without an answer: in no number above."""
    regression: str
    """`official`, `none`, or the substitute for the official regression data."""
    notes: tuple[str, ...]


def score(
    annotations: Sequence[Annotation],
    data: AlpacaData,
    resamples: int,
    seed: int,
    again: Sequence[Annotation] = (),
) -> AlpacaScore:
    """The numbers of one model's annotations; raises EvaluationError where none is judged, or several models are.

    `again`: answers of the same model to the same instructions, asked for at another length (`at_length`). They help to
    tell what length does, and are in no other number.
    """
    model, baseline = _one_model([*annotations, *again])
    found, more = in_order(annotations, data), in_order(again, data)
    judged = [place for place, one in enumerate(found) if _is_judged(one)]
    failed = sum(one is not None and one.preference is None for one in found)
    rows, lengths, baseline_lengths = _rows(found, judged, data)
    fitted = _with(rows, judged, more, data) if again else rows
    rates = win_rate(rows.preference)
    notes = list(data.notes)
    controlled, lc = None, None
    try:
        if data.difficulty is not None:  # else the notes say what lacks
            controlled, lc = _controlled(fitted, data.gamed, resamples, seed, is_baseline=model == baseline)
    except EvaluationError as error:
        notes.append(f"no length-controlled rate: {error}")
    missing = len(found) - len(judged) - failed
    if failed or missing:
        notes.append(
            f"{failed} answers without a verdict and {missing} instructions without an answer, of {len(found)}, are in "
            "no number"
        )
    if again:
        count = len(fitted.gap) - len(rows.gap)
        notes.append(f"length control includes {count} judged answers that were asked for at another length")
    warning = overlap_of(fitted.gap).warning
    if warning and controlled:
        notes.append(warning)
    if controlled and controlled is not OWN_RATE and controlled.c <= GRID[0]:
        notes.append(
            f"on {len(judged)} judged instructions cross-validation took the strongest penalty, which draws the "
            "length-controlled rate to 50 whatever the answers say; it means something with more instructions"
        )
    return AlpacaScore(
        model=model,
        baseline=baseline,
        rates=rates,
        win=statistics.score(rows.preference - 1, resamples, seed),
        controlled=controlled,
        lc=lc,
        overlap=overlap_of(rows.gap),
        mean_length=float(lengths.mean()),
        baseline_length=float(baseline_lengths.mean()),
        judged=len(judged),
        failed=failed,
        missing=missing,
        regression=data.regression,
        notes=tuple(notes),
    )


@dataclass(frozen=True, slots=True)
class AlpacaGain:
    """Improvements of checkpoints on the starting model, in points, over the instructions that all were judged on."""

    win: Improvement
    lc: Improvement | None
    """None where length cannot be controlled for in one of them."""
    judged: int


def gain(
    start: Sequence[Annotation],
    checkpoints: Sequence[Sequence[Annotation]],
    data: AlpacaData,
    resamples: int,
    seed: int,
    again: Sequence[Sequence[Annotation]] = (),
) -> AlpacaGain:
    """Paired improvements: each resample draws instructions, and every model is fitted anew to that draw.

    `again`: for the start and each checkpoint, what `score` takes by that name.
    """
    found = [in_order(rows, data) for rows in (start, *checkpoints)]
    shared = [place for place in range(len(data.instructions)) if all(_is_judged(rows[place]) for rows in found)]
    if not shared:
        raise EvaluationError("no instruction was judged for every model, so improvements cannot be paired")
    models = [_rows(rows, shared, data)[0] for rows in found]
    preference = np.stack([rows.preference for rows in models]) - 1
    for place, more in enumerate(again):
        models[place] = _with(models[place], shared, in_order(more, data), data) if more else models[place]
    lc = None
    if data.difficulty is not None:
        with suppress(EvaluationError):
            draws = statistics.draws(len(shared), resamples, seed)
            lc = length_controlled_rates(models, data.gamed, draws).improvement()
    return AlpacaGain(statistics.improvement(preference[0], preference[1:], resamples, seed), lc, len(shared))


def length_controlled_rates(
    models: Sequence[JudgedRows], gamed: GamedRows | None, draws: Int[ndarray, "resamples instructions"]
) -> Estimate:
    """The length-controlled win rates of models on the same instructions, each fitted anew to every draw of them."""
    fits = [length_controlled(rows, gamed) for rows in models]
    spread = [refit(rows, gamed, fit.c, draws) for rows, fit in zip(models, fits, strict=True)]
    lean = [_acceleration(rows, gamed, fit.c) for rows, fit in zip(models, fits, strict=True)]
    values = np.array([fit.win_rate for fit in fits])
    return Estimate(values, np.stack(spread, axis=1), accelerations=np.array(lean))


def overlap_of(gap: Float[ndarray, " rows"]) -> Overlap:
    """How a model's answers compare in length with the baseline's; `gap` as in `JudgedRows`."""
    spread = float(gap.std())
    return Overlap(
        longer=float((gap < 0).mean()),
        shorter=float((gap > 0).mean()),
        shift=-float(gap.mean()) / spread if spread else 0.0,
    )


def at_length(instruction: Instruction, overlap: Overlap) -> Prompt:
    """The remedy of Appendix D: the instruction, with the wish for an answer about as long as the baseline's."""
    side = "shorter" if overlap.longer > overlap.shorter else "longer"
    words = max(1, len(instruction.baseline.split()))
    return user_prompt(
        f"{instruction.text}\n\nGive a {side} answer than you otherwise would, of about {words} words. Do not mention "
        "its length."
    )


def leaderboard_row(result: AlpacaScore) -> dict[str, float | int | str | None]:
    """The columns of alpaca_eval's leaderboard."""
    rates, controlled = result.rates, result.controlled
    return {
        "": result.model,
        "win_rate": rates.win_rate,
        "standard_error": rates.standard_error,
        "n_wins": rates.wins,
        "n_wins_base": rates.losses,
        "n_draws": rates.draws,
        "n_total": result.judged,
        "discrete_win_rate": rates.discrete_win_rate,
        "avg_length": int(result.mean_length),
        "length_controlled_winrate": controlled.win_rate if controlled else None,
        "lc_standard_error": controlled.standard_error if controlled else None,
    }


def _controlled(
    rows: JudgedRows, gamed: GamedRows | None, resamples: int, seed: int, *, is_baseline: bool
) -> tuple[LengthControlled, Interval]:
    if is_baseline:
        return OWN_RATE, Interval(50, 50, 50)
    found = length_controlled(rows, gamed)
    draws = statistics.draws(len(rows.grouped().first), resamples, seed)
    spread, lean = refit(rows, gamed, found.c, draws), _acceleration(rows, gamed, found.c)
    return found, statistics.corrected(found.win_rate, spread, lean)


def _acceleration(rows: JudgedRows, gamed: GamedRows | None, c: float) -> float:
    """How skewed a length-controlled rate is."""
    n = len(rows.grouped().first)
    return statistics.acceleration(refit(rows, gamed, c, 1 - np.eye(n, dtype=int)))


def _is_judged(one: Annotation | None) -> bool:
    return one is not None and one.preference is not None


def _one_model(annotations: Sequence[Annotation]) -> tuple[str, str]:
    pairs = sorted({(one.model, one.baseline_model) for one in annotations})
    if not pairs:
        raise EvaluationError("there is no annotation, so there is nothing to score")
    if len(pairs) > 1:
        (one, _), (other, _) = pairs[:2]
        raise EvaluationError(f"the annotations are of {len(pairs)} models ({one!r}, {other!r}); score each by itself")
    return pairs[0]


def _rows(
    found: Sequence[Annotation | None], judged: Sequence[int], data: AlpacaData
) -> tuple[JudgedRows, ndarray, ndarray]:
    kept = [one for place in judged if (one := found[place])]
    lengths = np.array([len(one.answer) for one in kept], dtype=float)
    baseline = np.array([len(one.baseline) for one in kept], dtype=float)
    preference = np.array([one.preference for one in kept], dtype=float)
    rows = JudgedRows(preference, baseline - lengths, data.difficulty_of(judged), np.array(judged, dtype=int))
    return rows, lengths, baseline


def _with(rows: JudgedRows, judged: Sequence[int], more: Sequence[Annotation | None], data: AlpacaData) -> JudgedRows:
    """The rows and, of the same instructions, those that were answered again."""
    places = [place for place in judged if _is_judged(more[place])]
    again, _, _ = _rows(more, places, data)
    return JudgedRows(
        np.concatenate([rows.preference, again.preference]),
        np.concatenate([rows.gap, again.gap]),
        np.concatenate([rows.difficulty, again.difficulty]),
        np.array([*judged, *places]),
    )
