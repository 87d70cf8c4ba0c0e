"""The tables of a run as finished text, for the report and for the terminal: yield, contrast, scores, improvements.

Numbers come in; rows of strings go out, so a page and a terminal show the same digits. Nothing here escapes: cells can
hold any text, and whoever prints them (HTML, rich) makes it harmless there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from anchored.contrast import MeanContrast
from anchored.records import Outcome
from anchored.report.evaluated import Gain, Interval
from anchored.report.scoreboard import Scoreboard

_NUMBER = re.compile(r"[+−-]?[\d.]")

MEANINGS = {
    Outcome.OK: "kept",
    Outcome.NO_HEADER: "the reply lacks the header that the revision should stand under",
    Outcome.REPEATED_HEADER: "the reply has the revision's header more than once",
    Outcome.EMPTY: "an empty answer",
    Outcome.TRUNCATED: "the reply was cut at its token limit",
    Outcome.REFUSAL: "the model declined to answer",
    Outcome.ENDPOINT_ERROR: "no reply after all retries",
    Outcome.IDENTICAL: "chosen and rejected are the same text",
    Outcome.LENGTH_RATIO: "the revision is far longer or shorter than the answer",
    Outcome.LEAK: "the revision speaks of being one",
    Outcome.CONTRAST: "the two answers differ less or more than the filter allows",
    Outcome.TOO_LONG: "an answer has more characters than are allowed",
    Outcome.REPETITION: "an answer says the same over and over",
    Outcome.CONTROL_CHARACTERS: "an answer holds characters that are no text",
    Outcome.HTML: "an answer is an HTML page that nobody asked for",
    Outcome.OWN_FILTER: "refused by a filter of your own",
    Outcome.CONTAMINATED: "the prompt shares its words with a benchmark's question",
    Outcome.MISSING_ANSWER: "the given answers have none for the prompt",
    Outcome.SURPLUS: "a pair beyond create.target",
    Outcome.DROPPED: "dropped by a person",
    Outcome.TIE: "the judge found no winner",
    Outcome.DISAGREEMENT: "the judge changed its mind with the order of the answers",
    Outcome.UNPARSABLE: "the judge's reply names no winner",
    Outcome.IDENTICAL_SAMPLES: "both samples are the same text",
    Outcome.ADDRESSES_JUDGE: "an answer speaks to its judge instead of to the user",
    Outcome.CONTRADICTED_SCORE: "the best score is contradicted by the ratings beside it",
    Outcome.DOUBLED_TURN: "the conversation would repeat a turn",
    Outcome.NO_ASSISTANT_TURN: "no assistant turn to learn from",
    Outcome.MALFORMED: "the row cannot be read as a pair",
}


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of finished text; the first column, or as many as `names`, name the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    names: int = 1

    def is_numeric(self, column: int) -> bool:
        """Whether a column holds numbers, which stand to the right."""
        return column > 0 and all(_NUMBER.match(row[column]) for row in self.rows if row[column])


def contrast_table(measured: Mapping[str, MeanContrast]) -> Table:
    """How far chosen and rejected answers differ, by data set (the paper's Table 1)."""
    tokenizers = {mean.tokenizer for mean in measured.values()}
    rows = [
        (
            source,
            f"{mean.pairs:,}",
            f"{mean.jaccard:.2f}",
            f"{mean.levenshtein:,.1f}",
            f"{mean.normalised_levenshtein:.3f}",
            f"{mean.length_ratio:.2f}",
            f"{mean.shared_prefix:,.1f}",
            f"{100 * mean.shared_prefix_share:.1f} %",
            f"{100 * mean.leak_rate:.1f} %",
        )
        for source, mean in measured.items()
    ]
    return Table(
        "Contrast",
        (
            "pairs of",
            "n",
            f"Jaccard ↑ ({', '.join(sorted(tokenizers))})",
            "Levenshtein ↓",
            "normalised ↓",
            "length ratio",
            "shared prefix ↑",
            "of shorter ↑",
            "leaks ↓",
        ),
        tuple(rows),
        note=(
            "Means over pairs; arrows point to the more minimal contrast. Levenshtein in characters, normalised by the "
            "longer answer; shared prefix in characters, and as a share of the shorter answer; leaks: chosen answers "
            "that speak of being a revision."
        ),
    )


def score_table(board: Scoreboard) -> Table:
    """The starting model against every checkpoint, by category."""
    named = [category for category in board.categories if category is not None]
    rows = []
    for checkpoint in board.checkpoints:
        whole = board.get(checkpoint, None)
        cells = [
            f"{whole.score:.1f}" if whole else "",
            f"{whole.low:.1f}–{whole.high:.1f}" if whole else "",
            signed(board.change(checkpoint, None)),
        ]
        for category in named:
            score = board.get(checkpoint, category)
            cells.append(f"{score.score:.1f}" if score else "")
        rows.append((checkpoint, *cells))
    return Table(
        f"Scores: {board.title}",
        ("checkpoint", "score", "95 %", "change", *named),
        tuple(rows),
        note=f"Percent over {board.items(None)} items; change is in points against the starting model{_over(board)}.",
    )


def improvement_table(gains: Iterable[Gain]) -> Table:
    """How checkpoints improve on the starting model (the paper's Table 2)."""
    rows = [
        (
            " · ".join(filter(None, (gain.benchmark, gain.view, gain.category))),
            with_interval(gain.max),
            gain.max_checkpoint,
            with_interval(gain.mean),
            f"{gain.sd:.1f}" if len(gain.changes) != 1 else "",
            with_interval(gain.last),
        )
        for gain in gains
    ]
    return Table(
        "Improvement on the starting model",
        ("benchmark", "best", "by", "mean", "sd", "last"),
        tuple(rows),
        note="Points, with 95 % paired bootstrap intervals over questions; the best's interval allows for the choice.",
    )


def remarks_table(remarks: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Table:
    """What was noticed about answers and verdicts: counts by benchmark, checkpoint and kind."""
    checkpoints = dict.fromkeys(name for found in remarks.values() for name in found)
    rows = [
        (f"{benchmark} · {kind}", *(f"{found.get(name, {}).get(kind, 0):,}" for name in checkpoints))
        for benchmark, found in remarks.items()
        for kind in dict.fromkeys(kind for counts in found.values() for kind in counts)
    ]
    return Table(
        "Noticed about the answers",
        ("answers", *checkpoints),
        tuple(rows),
        note="Items without an answer or a verdict are in no score. answers/BENCHMARK/CHECKPOINT.jsonl tells each.",
    )


def yield_table(outcomes: Mapping[Outcome, int]) -> Table:
    """How many rows each outcome took, the kept ones first."""
    total = sum(outcomes.values())
    ordered = sorted(outcomes.items(), key=lambda item: (item[0] is not Outcome.OK, -item[1]))
    return Table(
        "Yield",
        ("outcome", "rows", "share", "meaning"),
        tuple((str(name), f"{n:,}", f"{100 * n / total:.1f} %", MEANINGS[name]) for name, n in ordered),
        note="Rows of all prompts, the held-out ones included.",
    )


def _over(board: Scoreboard) -> str:
    return f", over the items that both have a grade for, at least {board.shared:,}" if board.shared else ""


def signed(points: float | None) -> str:
    """A difference with its sign; a true minus, nothing for None."""
    if points is None:
        return ""
    # adding 0 makes a zero of a minus zero
    return f"{round(points, 1) + 0:+.1f}".replace("-", "−")


def with_interval(gain: Interval) -> str:
    """A difference with its interval."""
    return f"{signed(gain.value)} [{signed(gain.low)}, {signed(gain.high)}]"


def characters(difference: float) -> str:
    """A difference in characters with its sign."""
    return f"{round(difference):+,}".replace("-", "−")


def duration(seconds: float) -> str:
    """41 s, 6 min 40 s, 12 h 31 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"
