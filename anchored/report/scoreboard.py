"""Lines of scores sorted for reading: one board per benchmark and view, checkpoints by step, categories by size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from anchored.records import START, STRONGER, Score


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


def scoreboards(scores: Iterable[Score]) -> list[Scoreboard]:
    """Scores sorted into boards, in the order in which the benchmarks appear; a repeated line replaces the older."""
    boards: dict[tuple[str, str, str], dict[tuple[str, str | None], Score]] = {}
    for score in scores:
        cells = boards.setdefault((score.benchmark, score.version, score.view), {})
        cells[score.checkpoint, score.category] = score
    return [_board(*key, cells) for key, cells in boards.items()]


def _board(benchmark: str, version: str, view: str, cells: dict[tuple[str, str | None], Score]) -> Scoreboard:
    steps = {checkpoint: score.step for (checkpoint, _), score in cells.items()}
    checkpoints = sorted(steps, key=lambda name: (name == STRONGER, name != START, steps[name], name))
    sizes: dict[str | None, int] = {}
    for (_, category), score in cells.items():
        sizes[category] = max(score.n, sizes.get(category, 0))
    categories = sorted(sizes, key=lambda name: (name is not None, -sizes[name], name or ""))
    return Scoreboard(benchmark, version, view, tuple(checkpoints), tuple(categories), cells)
