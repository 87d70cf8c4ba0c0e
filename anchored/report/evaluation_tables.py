"""What one run's evaluation says beside its scores: chosen checkpoints, gaps closed, lengths, categories, notes."""

from __future__ import annotations

import statistics

from anchored.records import START
from anchored.report.evaluated import Evaluated, Gain, Interval
from anchored.report.scoreboard import Scoreboard
from anchored.report.tables import Table, characters, signed, with_interval


def evaluation_tables(evaluated: Evaluated) -> list[Table]:
    """Those that have something to show."""
    tables = (
        notes_table(evaluated),
        chosen_table(evaluated),
        behind_table(evaluated),
        stronger_table(evaluated),
        length_table(evaluated),
    )
    return [table for table in tables if table.rows]


def chosen_table(evaluated: Evaluated) -> Table:
    """How checkpoints that were best on one benchmark do on another."""
    rows = [
        (
            f"{one.benchmark} · {one.view}",
            one.on,
            ", ".join(one.checkpoints),
            with_interval(one.gain),
            f"{one.n:,}",
            f"{one.left_out:,}",
        )
        for one in evaluated.chosen
    ]
    return Table(
        "Chosen on one benchmark, reported on another",
        ("reported on", "chosen on", "checkpoints", "improvement", "questions", "left out"),
        tuple(rows),
        note=(
            "Points gained on the starting model, with 95 % paired intervals; of several checkpoints the mean. Nothing "
            "was picked on these questions, and those that both benchmarks ask are left out: unlike the best of many, "
            "this does not flatter."
        ),
    )


def behind_table(evaluated: Evaluated) -> Table:
    """Whether the best checkpoint of each benchmark, in its first view, is better than the others."""
    first: dict[str, Gain] = {}
    for gain in evaluated.improvement:
        if gain.category is None:
            first.setdefault(gain.benchmark, gain)
    shown = [gain for gain in first.values() if gain.behind_best]
    rows = [
        (
            checkpoint,
            *(
                "best"
                if checkpoint == gain.max_checkpoint
                else with_interval(gain.behind_best[checkpoint])
                if checkpoint in gain.behind_best
                else ""
                for gain in shown
            ),
        )
        for checkpoint in (evaluated.trained if shown else ())
    ]
    return Table(
        "Against the best checkpoint",
        ("checkpoint", *(f"{gain.benchmark} · {gain.view}" for gain in shown)),
        tuple(rows),
        note=(
            "Points, with 95 % paired intervals. Where an interval holds 0, the best one's lead may be chance; it was "
            "picked for its score, so even others may."
        ),
    )


def length_table(evaluated: Evaluated) -> Table:
    """Characters per answer, and how training changed them."""
    rows = []
    for benchmark, changes in evaluated.length_changes.items():
        if changes:
            most, last = max(changes, key=lambda name: abs(changes[name].value)), list(changes)[-1]
            rows.append(
                (
                    benchmark,
                    f"{evaluated.lengths.get(benchmark, {}).get(START, 0):,.0f}",
                    characters(statistics.fmean(change.value for change in changes.values())),
                    f"{_length(changes[last])} ({last})",
                    f"{_length(changes[most])} ({most})",
                )
            )
    return Table(
        "Length of the answers",
        ("benchmark", "starting model", "mean change", "last", "largest change"),
        tuple(rows),
        note="Characters per answer, with 95 % intervals. A judge that compares answers favours longer ones.",
    )


def stronger_table(evaluated: Evaluated) -> Table:
    """How much of the distance to a stronger model is made up."""
    rows = []
    for one in evaluated.stronger:
        known = {name: share for name, share in one.closed.items() if share}
        best = max(known, key=lambda name: known[name].value, default=None)
        last = list(one.closed)[-1] if one.closed else None
        rows.append(
            (
                f"{one.benchmark} · {one.view}",
                one.model,
                with_interval(one.gap),
                f"{_share(known[best])} ({best})" if best else "no gap to speak of" if one.closed else "",
                f"{_share(known[last])} ({last})" if last in known else "",
            )
        )
    return Table(
        "Gap to a stronger model",
        ("benchmark", "stronger model", "gap", "closed by the best", "by the last"),
        tuple(rows),
        note="Gap in points between the starting and the stronger model; closed: the share of it that is made up.",
    )


def notes_table(evaluated: Evaluated) -> Table:
    """What to know before trusting a score."""
    rows = []
    for benchmark, found in evaluated.notes.items():
        for text in dict.fromkeys(text for texts in found.values() for text in texts):
            named = [checkpoint for checkpoint, texts in found.items() if text in texts]
            everybody = len(named) > 1 and len(named) == len(evaluated.checkpoints)
            rows.append((benchmark, "all" if everybody else ", ".join(named), text))
    rows += [(benchmark, "", text) for benchmark, texts in evaluated.not_scored.items() for text in texts]
    return Table("Before you trust these scores", ("benchmark", "checkpoint", "note"), tuple(rows))


def breakdown_table(board: Scoreboard) -> Table:
    """By category, the starting model and the best checkpoint, each with its interval (the paper's Table 4)."""
    best = board.best
    rows = []
    for category in board.categories if best else ():
        before, after = board.get(START, category), board.get(best.checkpoint, category) if best else None
        if before and after:
            found = board.gains.get(category)
            change = found.changes.get(after.checkpoint) if found else None
            rows.append(
                (
                    "overall" if category is None else category,
                    f"{after.n:,}",
                    f"{before.score:.1f} [{before.low:.1f}, {before.high:.1f}]",
                    f"{after.score:.1f} [{after.low:.1f}, {after.high:.1f}]",
                    with_interval(change) if change else signed(board.change(after.checkpoint, category)),
                )
            )
    return Table(
        f"Breakdown: {board.title}",
        ("category", "n", "start", best.checkpoint if best else "", "change"),
        tuple(rows) if len(rows) > 1 else (),
        note=(
            "Percent, and points of change, with 95 % intervals (of the change paired). The checkpoint was picked for "
            "its overall score on these questions; a category of few questions shows little."
        ),
    )


def _share(interval: Interval) -> str:
    return f"{interval.value:.0f} % [{interval.low:.0f}, {interval.high:.0f}]".replace("-", "−")


def _length(change: Interval) -> str:
    return f"{characters(change.value)} [{characters(change.low)}, {characters(change.high)}]"
