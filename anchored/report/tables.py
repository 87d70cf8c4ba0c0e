"""The tables of a run as finished text, for the report and for the terminal: yield, contrast, scores, improvements.

Numbers come in; rows of strings go out, so a page and a terminal show the same digits. Nothing here escapes: cells can
hold any text, and whoever prints them (HTML, rich) makes it harmless there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from anchored.contrast import MeanContrast
from anchored.records import Outcome, Score

START = "start"
"""The name under which the starting model stands in scores.jsonl."""

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
    Outcome.TIE: "the judge found no winner",
    Outcome.DISAGREEMENT: "the judge changed its mind with the order of the answers",
    Outcome.UNPARSABLE: "the judge's reply names no winner",
    Outcome.IDENTICAL_SAMPLES: "both samples are the same text",
    Outcome.DOUBLED_TURN: "the conversation would repeat a turn",
    Outcome.NO_ASSISTANT_TURN: "no assistant turn to learn from",
    Outcome.MALFORMED: "the row cannot be read as a pair",
}


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of finished text; the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def is_numeric(self, column: int) -> bool:
        """Whether a column holds numbers, which stand to the right."""
        return column > 0 and all(_NUMBER.match(row[column]) for row in self.rows if row[column])


@dataclass(frozen=True, slots=True, eq=False)
class Scoreboard:
    """One benchmark in one view: the starting model and every checkpoint, as a whole (None) and by category."""

    benchmark: str
    version: str
    view: str
    checkpoints: tuple[str, ...]
    """By step, the starting model first."""
    categories: tuple[str | None, ...]
    """The whole first, then by number of items."""
    scores: Mapping[tuple[str, str | None], Score]

    @property
    def title(self) -> str:
        return " · ".join(filter(None, (self.benchmark, self.version, self.view)))

    @property
    def whole(self) -> list[Score]:
        """The checkpoints' scores on the whole benchmark, as far as they are known."""
        return [self.scores[name, None] for name in self.checkpoints if (name, None) in self.scores]

    @property
    def start(self) -> Score | None:
        return self.scores.get((START, None))

    @property
    def trained(self) -> list[Score]:
        return [score for score in self.whole if score.checkpoint != START]

    @property
    def best(self) -> Score | None:
        """The checkpoint with the highest score, the earliest of equals."""
        return max(self.trained, key=lambda score: score.score, default=None)

    @property
    def judges(self) -> str:
        return ", ".join(sorted({score.judge for score in self.whole if score.judge}))

    def get(self, checkpoint: str, category: str | None) -> Score | None:
        return self.scores.get((checkpoint, category))

    def items(self, category: str | None) -> int:
        """Items behind a category's scores; the most where checkpoints differ."""
        return max((score.n for (_, name), score in self.scores.items() if name == category), default=0)

    def change(self, checkpoint: str, category: str | None) -> float | None:
        """Points gained on the starting model."""
        before, after = self.scores.get((START, category)), self.scores.get((checkpoint, category))
        return after.score - before.score if before and after and checkpoint != START else None


def contrast_table(measured: Mapping[str, MeanContrast]) -> Table:
    """How far chosen and rejected answers differ, by data set (the paper's Table 1)."""
    tokenizers = {mean.tokenizer for mean in measured.values()}
    rows = [
        (source, f"{mean.pairs:,}", f"{mean.jaccard:.2f}", f"{mean.levenshtein:,.1f}", f"{mean.length_ratio:.2f}")
        for source, mean in measured.items()
    ]
    return Table(
        "Contrast",
        ("pairs of", "n", f"Jaccard ↑ ({', '.join(sorted(tokenizers))})", "Levenshtein ↓ (characters)", "length ratio"),
        tuple(rows),
        note="Means over pairs. More tokens in common, fewer edits: answers that differ in little but what was improved.",
    )


def scoreboards(scores: Iterable[Score]) -> list[Scoreboard]:
    """Scores sorted into boards, in the order in which the benchmarks appear; a repeated line replaces the older."""
    boards: dict[tuple[str, str, str], dict[tuple[str, str | None], Score]] = {}
    for score in scores:
        cells = boards.setdefault((score.benchmark, score.version, score.view), {})
        cells[score.checkpoint, score.category] = score
    return [_board(*key, cells) for key, cells in boards.items()]


def score_table(board: Scoreboard) -> Table:
    """The starting model against every checkpoint, by category."""
    named = [category for category in board.categories if category is not None]
    rows = []
    for checkpoint in board.checkpoints:
        whole = board.get(checkpoint, None)
        cells = [
            f"{whole.score:.1f}" if whole else "",
            f"{whole.low:.1f} to {whole.high:.1f}" if whole else "",
            signed(board.change(checkpoint, None)),
        ]
        for category in named:
            score = board.get(checkpoint, category)
            cells.append(f"{score.score:.1f}" if score else "")
        rows.append((checkpoint, *cells))
    return Table(
        f"Scores: {board.title}",
        ("checkpoint", "score", "95 % interval", "change", *named),
        tuple(rows),
        note=f"Percent over {board.items(None):,} items; change is in points against the starting model.",
    )


def improvement_table(improvements: Iterable[Mapping[str, Any]]) -> Table:
    """How checkpoints improve on the starting model (the paper's Table 2), from the evaluate stage's summary."""
    rows = [
        (
            f"{row['benchmark']} · {row['view']}",
            row["category"] or "overall",
            _gain(row["max"]),
            str(row["max_checkpoint"]),
            _gain(row["mean"]),
            f"{row['sd']:.1f}",
            _gain(row["last"]),
        )
        for row in improvements
    ]
    return Table(
        "Improvement on the starting model",
        ("benchmark", "category", "best", "best checkpoint", "mean", "sd", "last"),
        tuple(rows),
        note="Points, with 95 % paired bootstrap intervals over the items; the best's interval allows for the choosing.",
    )


def yield_table(outcomes: Mapping[Outcome, int]) -> Table:
    """How many rows each outcome took, the kept ones first."""
    total = sum(outcomes.values())
    ordered = sorted(outcomes.items(), key=lambda item: (item[0] is not Outcome.OK, -item[1]))
    return Table(
        "Yield",
        ("outcome", "rows", "share", "meaning"),
        tuple((str(name), f"{n:,}", f"{100 * n / total:.1f} %", MEANINGS[name]) for name, n in ordered),
    )


def signed(points: float | None) -> str:
    """A difference with its sign; a true minus, nothing for None."""
    if points is None:
        return ""
    return f"{points:+.1f}".replace("-", "−")


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


def _board(benchmark: str, version: str, view: str, cells: dict[tuple[str, str | None], Score]) -> Scoreboard:
    steps = {checkpoint: score.step for (checkpoint, _), score in cells.items()}
    checkpoints = sorted(steps, key=lambda name: (name != START, steps[name], name))
    sizes: dict[str | None, int] = {}
    for (_, category), score in cells.items():
        sizes[category] = max(score.n, sizes.get(category, 0))
    categories = sorted(sizes, key=lambda name: (name is not None, -sizes[name], name or ""))
    return Scoreboard(benchmark, version, view, tuple(checkpoints), tuple(categories), cells)


def _gain(interval: Mapping[str, float]) -> str:
    return f"{signed(interval['value'])} [{signed(interval['low'])}, {signed(interval['high'])}]"
