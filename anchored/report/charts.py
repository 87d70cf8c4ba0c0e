"""The curves of a run as Plotly figures: plain data, drawn by the page.

Lines of metrics.jsonl and trajectories.jsonl, scores and per-pair numbers come in; `Chart`s go out. Colours are names
of the page's CSS variables, so one figure serves light, dark and paper. Text from outside is escaped here, for Plotly
reads `<b>` and `<a>` in labels.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from anchored.records import STRONGER, Score
from anchored.report.scoreboard import Scoreboard
from anchored.report.tables import signed

Lines = Sequence[Mapping[str, Any]]

_MOST_POINTS = 1500
_SMOOTH_FROM = 60
_BINS = 32
_STEP = "optimizer step"


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure: Plotly traces and layout under a heading, with what a reader must know to read it."""

    id: str
    title: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    note: str = ""


def training_charts(metrics: Lines) -> list[Chart]:
    """What the optimizer saw, step by step; a quantity that no line has is left out."""
    wanted = [
        ("loss", "Loss", "loss"),
        ("reward_margin", "Reward margin", "chosen − rejected"),
        ("reward_accuracy", "Reward accuracy", "pairs with margin > 0"),
        ("grad_norm", "Gradient norm", "norm before clipping"),
        ("lr", "Learning rate", "learning rate"),
        ("tokens_per_second", "Speed", "tokens per second"),
    ]
    charts = []
    for key, title, axis in wanted:
        curve = _curve(metrics, key)
        if curve is not None:
            charts.append(_training_chart(key, title, axis, *curve))
    return charts


def held_out_charts(trajectories: Lines) -> list[Chart]:
    """The two panels of the paper's Figure 4: log-probability and reward of chosen and rejected held-out answers."""
    panels = [
        ("logp", "Log-probability", "mean log-probability"),
        ("reward", "Reward", "mean reward"),
    ]
    charts = []
    for key, title, axis in panels:
        traces = []
        for answer, dash in (("chosen", "solid"), ("rejected", "dash")):
            curve = _curve(trajectories, f"{key}_{answer}")
            if curve is not None:
                line = {"color": f"var(--{answer})", "width": 2.2, "dash": dash}
                traces.append(_trace(*curve, name=answer, mode="lines+markers", line=line, marker={"size": 5}))
        if traces:
            charts.append(Chart(f"held-out-{key}", title, traces, _layout(_STEP, axis, legend=True)))
    return charts


def score_chart(board: Scoreboard, number: int) -> Chart:
    """The score of each checkpoint with its interval; through it the levels of the start and of a stronger model."""
    scores = [score for score in board.whole if score.checkpoint != STRONGER]
    points = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": "checkpoint",
        "x": [score.step for score in scores],
        "y": [score.score for score in scores],
        "customdata": [[_label(score.checkpoint), score.low, score.high, _gained(board, score)] for score in scores],
        "hovertemplate": (
            "%{customdata[0]}: %{y:.1f} (%{customdata[1]:.1f} to %{customdata[2]:.1f})%{customdata[3]}<extra></extra>"
        ),
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [score.high - score.score for score in scores],
            "arrayminus": [score.score - score.low for score in scores],
            "color": "var(--accent-soft)",
            "thickness": 1.6,
            "width": 3,
        },
        "line": {"color": "var(--accent)", "width": 2.2},
        "marker": {"size": 7},
    }
    layout = _layout(_STEP, "score, percent")
    traces = [points]
    start, stronger = board.start, board.get(STRONGER, None)
    levels = [score for score in (start, stronger) if score]
    if levels:
        layout["annotations"] = [_level_label(f"{level.checkpoint} {level.score:.1f}", level.score) for level in levels]
        layout["margin"] = {"r": 82 if stronger is None else 104}
    if start:
        layout["shapes"] = [_level(start.score)]
    if stronger:  # as a line of its own, the axis reaches to it
        traces.append(_reached(stronger, [scores[0].step, scores[-1].step]))
    return Chart(f"scores-{number}", "Score by checkpoint, with 95 % intervals", traces, layout)


def _gained(board: Scoreboard, score: Score) -> str:
    change = board.change(score.checkpoint, None)
    return "" if change is None else f", {signed(change)} points on the start"


def _reached(stronger: Score, steps: list[int]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": stronger.checkpoint,
        "x": steps,
        "y": [stronger.score, stronger.score],
        "hovertemplate": f"{stronger.checkpoint}: {stronger.score:.1f} ({stronger.low:.1f} to {stronger.high:.1f})"
        "<extra></extra>",
        "line": {"color": "var(--muted)", "width": 1.4, "dash": "dot"},
    }


def histogram(
    id: str, title: str, axis: str, values: Iterable[float], bounds: tuple[float, float] | None = None
) -> Chart | None:
    """How a per-pair number spreads; without `bounds` a far tail is gathered in the last bar. None without numbers."""
    numbers = np.array([value for value in values if math.isfinite(value)], dtype=float)
    if not len(numbers):
        return None
    low, high = bounds or _most_of(numbers)
    beyond = int((numbers > high).sum())
    counts, edges = np.histogram(np.minimum(numbers, high), bins=_BINS, range=(low, high))
    bars = {
        "type": "bar",
        "x": ((edges[:-1] + edges[1:]) / 2).tolist(),
        "y": counts.tolist(),
        "width": np.diff(edges).tolist(),
        "customdata": np.stack([edges[:-1], edges[1:]], axis=1).round(2).tolist(),
        "hovertemplate": "%{customdata[0]} to %{customdata[1]}: %{y} pairs<extra></extra>",
        "marker": {"color": "var(--accent)", "line": {"width": 1, "color": "var(--surface)"}},
    }
    layout = _layout(axis, "pairs")
    layout["bargap"] = 0
    mean = float(numbers.mean())
    line = {"color": "var(--ink)", "width": 1.4, "dash": "dot"}
    at = min(mean, high)
    layout["shapes"] = [{"type": "line", "x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "paper", "line": line}]
    tail = f" The last bar gathers the {beyond:,} pairs above {_short(high)}." if beyond else ""
    return Chart(id, title, [bars], layout, note=f"Dotted: the mean, {_short(mean)}.{tail}")


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _most_of(numbers: Float[ndarray, " values"]) -> tuple[float, float]:
    """The range of the numbers, without the last hundredth where that lies far off."""
    low, most, high = np.quantile(numbers, [0, 0.99, 1]).tolist()
    return (low, most) if high > most + (most - low) / 4 else (low, high)


def _training_chart(
    key: str, title: str, axis: str, steps: Float[ndarray, " points"], values: Float[ndarray, " points"]
) -> Chart:
    missing = int((~np.isfinite(values)).sum())
    note = f"{missing:,} steps have no finite value." if missing else ""
    if key == "lr" or len(values) < _SMOOTH_FROM:
        traces = [_trace(*_thinned(steps, values), name=title.lower(), line={"color": "var(--accent)", "width": 2.2})]
        return Chart(f"train-{key}", title, traces, _layout(_STEP, axis), note)
    window = max(5, len(values) // 40) | 1
    raw = _trace(*_thinned(steps, values), name="each step", line={"color": "var(--accent-soft)", "width": 1})
    smooth = _trace(
        *_thinned(steps, _moving_mean(values, window)),
        name=f"mean of {window}",
        line={"color": "var(--accent)", "width": 2.2},
    )
    return Chart(f"train-{key}", title, [raw, smooth], _layout(_STEP, axis, legend=True), note)


def _curve(lines: Lines, key: str) -> tuple[Float[ndarray, " points"], Float[ndarray, " points"]] | None:
    """Steps and values of a quantity, by step; a step written again by a resumed run counts once, as it was last."""
    known = {line["step"]: line[key] for line in lines if _is_number(line.get("step")) and _is_number(line.get(key))}
    if not known:
        return None
    steps = sorted(known)
    values = np.array([known[step] for step in steps], dtype=float)
    return (np.array(steps, dtype=float), values) if np.isfinite(values).any() else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _thinned(
    steps: Float[ndarray, " points"], values: Float[ndarray, " points"]
) -> tuple[Float[ndarray, " kept"], Float[ndarray, " kept"]]:
    """At most `_MOST_POINTS` points: the lowest and the highest of each stretch of steps, so no spike is lost."""
    if len(steps) <= _MOST_POINTS:
        return steps, values
    kept: set[int] = {0, len(steps) - 1}
    for stretch in np.array_split(np.arange(len(steps)), _MOST_POINTS // 2):
        here = np.where(np.isfinite(values[stretch]), values[stretch], np.nan)
        if np.isfinite(here).any():
            kept |= {int(stretch[np.nanargmin(here)]), int(stretch[np.nanargmax(here)])}
    chosen = sorted(kept)
    return steps[chosen], values[chosen]


def _moving_mean(values: Float[ndarray, " points"], window: int) -> Float[ndarray, " points"]:
    """Centred mean of the finite values in a window, narrower at the ends."""
    finite = np.isfinite(values)
    ones = np.ones(window)
    counts = np.convolve(finite.astype(float), ones, "same")
    sums = np.convolve(np.where(finite, values, 0.0), ones, "same")
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def _trace(
    steps: Float[ndarray, " points"], values: Float[ndarray, " points"], *, name: str, mode: str = "lines", **style: Any
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": mode,
        "name": name,
        "x": steps.tolist(),
        "y": [float(f"{value:.6g}") for value in values],
        "hovertemplate": "step %{x}: %{y:.4g}",
        **style,
    }


def _layout(x: str, y: str, *, legend: bool = False) -> dict[str, Any]:
    return {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}, "showlegend": legend}


def _level(height: float) -> dict[str, Any]:
    line = {"color": "var(--muted)", "width": 1.4, "dash": "dash"}
    return {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": height, "y1": height, "line": line}


def _level_label(text: str, height: float) -> dict[str, Any]:
    place = {"x": 1.005, "xref": "paper", "xanchor": "left", "y": height, "yanchor": "middle"}
    return {"text": text, **place, "showarrow": False, "font": {"color": "var(--muted)", "size": 12}}


def _label(text: str) -> str:
    return html.escape(text, quote=False)
