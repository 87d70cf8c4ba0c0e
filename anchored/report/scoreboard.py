"""Lines of scores sorted for reading: one board per benchmark and view, checkpoints by step, categories by size.

A change on the starting model is the paired one where the evaluation tells it: over the items both have a grade for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from anchored.records import START, STRONGER, Score
from anchored.report.evaluated import Evaluated, Gain


@dataclass(frozen=True, slots=True, eq=False)
class Scoreboard:
    """One benchmark in one view: the starting model and every checkpoint, as a whole (None) and by category."""

    benchmark: str
    version: str
    view: str
    checkpoints: tuple[str, ...]
    """By step, the starting model first, a stronger model last."""
    categories: tuple[str | None, ...]
    """The whole first, then by number of items."""
    scores: Mapping[tuple[str, str | None], Score]
    gains: Mapping[str | None, Gain]
    """What the evaluation tells of the checkpoints' changes, by category."""
    gap: float | None
    """By how many points a stronger model is ahead of the starting model, paired."""

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
        return [score for score in self.whole if score.checkpoint not in (START, STRONGER)]

    @property
    def best(self) -> Score | None:
        """The checkpoint that gained most, else the one with the highest score; the earliest of equals."""
        picked = self.get(self.gains[None].max_checkpoint, None) if None in self.gains else None
        return picked or max(self.trained, key=lambda score: score.score, default=None)

    @property
    def judges(self) -> str:
        """Of the run's own models."""
        own = (score.judge for score in self.whole if score.checkpoint != STRONGER)
        return ", ".join(sorted({judge for judge in own if judge}))

    def get(self, checkpoint: str, category: str | None) -> Score | None:
        return self.scores.get((checkpoint, category))

    def items(self, category: str | None) -> str:
        """Items behind a category's scores, from the fewest to the most where the run's own models differ."""
        own = [
            score for (checkpoint, name), score in self.scores.items() if name == category and checkpoint != STRONGER
        ]
        counts = sorted(score.n for score in own) or [0]
        return f"{counts[0]:,}" if counts[0] == counts[-1] else f"{counts[0]:,} to {counts[-1]:,}"

    def change(self, checkpoint: str, category: str | None) -> float | None:
        """Points gained on the starting model: paired, or where that is not told the difference of both scores."""
        before, after = self.scores.get((START, category)), self.scores.get((checkpoint, category))
        if before is None or after is None or checkpoint == START:
            return None
        paired = self._paired(checkpoint, category)
        return after.score - before.score if paired is None else paired

    @property
    def shared(self) -> int | None:
        """Items behind each change on the whole, at least, where they are fewer than a score of the run's own has."""
        n = self.gains[None].n if None in self.gains else 0
        return n if n and any(score.n > n for score in (self.start, *self.trained) if score) else None

    def _paired(self, checkpoint: str, category: str | None) -> float | None:
        if checkpoint == STRONGER:
            return self.gap if category is None else None
        if (gain := self.gains.get(category)) is None:
            return None
        # older summaries tell of these two alone
        told = {self.trained[-1].checkpoint: gain.last} if self.trained else {}
        told |= {gain.max_checkpoint: gain.max, **gain.changes}
        return told[checkpoint].value if checkpoint in told else None


def scoreboards(scores: Iterable[Score], evaluated: Evaluated | None = None) -> list[Scoreboard]:
    """Scores sorted into boards, in the order in which the benchmarks appear; a repeated line replaces the older."""
    boards: dict[tuple[str, str, str], dict[tuple[str, str | None], Score]] = {}
    for score in scores:
        cells = boards.setdefault((score.benchmark, score.version, score.view), {})
        cells[score.checkpoint, score.category] = score
    return [_board(*key, cells, evaluated or Evaluated()) for key, cells in boards.items()]


def _board(
    benchmark: str, version: str, view: str, cells: dict[tuple[str, str | None], Score], evaluated: Evaluated
) -> Scoreboard:
    steps = {checkpoint: score.step for (checkpoint, _), score in cells.items()}
    checkpoints = sorted(steps, key=lambda name: (name == STRONGER, name != START, steps[name], name))
    sizes: dict[str | None, int] = {}
    for (_, category), score in cells.items():
        sizes[category] = max(score.n, sizes.get(category, 0))
    categories = sorted(sizes, key=lambda name: (name is not None, -sizes[name], name or ""))
    gains = {one.category: one for one in evaluated.improvement if (one.benchmark, one.view) == (benchmark, view)}
    gaps = [one.gap.value for one in evaluated.stronger if (one.benchmark, one.view) == (benchmark, view)]
    return Scoreboard(
        benchmark, version, view, tuple(checkpoints), tuple(categories), cells, gains, gaps[0] if gaps else None
    )
