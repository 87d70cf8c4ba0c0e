"""What a run folder holds, as far as the run has come: recipe, summaries, rows, curves and scores."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from anchored.contrast import MeanContrast, completed, mean_contrast, normalised
from anchored.datasets_io import read_rows
from anchored.errors import DataError
from anchored.records import Outcome, Pair, Score
from anchored.report.evaluated import Evaluated, read_evaluated
from anchored.report.scoreboard import Scoreboard, scoreboards
from anchored.runs import Run, read_lines
from anchored.teachers import TEAM, teachers

Group = Literal["training", "held-out", "refused"]

_NUMBERS = ("jaccard", "levenshtein", "length_ratio")
_OF_A_MEAN = set(MeanContrast.__slots__)


@dataclass(frozen=True, slots=True)
class Row:
    """A pair, the file it stands in, and how far its answers differ (None where that was not measured)."""

    pair: Pair
    group: Group
    jaccard: float | None = None
    levenshtein: float | None = None
    length_ratio: float | None = None

    @property
    def normalised(self) -> float | None:
        """The distance per character of the longer answer."""
        chosen, rejected = self.pair.chosen.text, self.pair.rejected.text
        return None if self.levenshtein is None else normalised(self.levenshtein, chosen, rejected)


class Contents:
    """The files of a run, each read when it is first asked for."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._summaries: dict[str, Mapping[str, Any]] = {}

    @cached_property
    def recipe(self) -> Mapping[str, Any]:
        return self.run.read_recipe() or {}

    @property
    def recipe_text(self) -> str:
        return self.run.recipe.read_text("utf-8") if self.recipe else ""

    def setting(self, key: str) -> Any:
        """A setting by its dotted name; None where the recipe does not have it."""
        value: Any = self.recipe
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def summary(self, stage: str) -> Mapping[str, Any]:
        """What a stage said of itself; empty while it is not complete."""
        if stage not in self._summaries:
            self._summaries[stage] = self.run.summary(stage) or {}
        return self._summaries[stage]

    @property
    def policy(self) -> str:
        """The policy's short name."""
        return Path(self.setting("policy.model") or "").name

    @property
    def teacher(self) -> str | None:
        """The stronger models that revised, judged or answered; None where the data was judged already."""
        asked = teachers(self.recipe.get("create") or {})
        if not asked:
            return None
        if asked[0] == TEAM:
            return ", ".join(dict.fromkeys(step["model"] for step in self.setting("create.team")))
        return self.setting(f"create.{asked[0]}.model")

    @cached_property
    def rows(self) -> list[Row]:
        """Training pairs, held-out pairs and refused rows, each in the order of its file."""
        return [row for group, path in row_files(self.run).items() for row in _rows(path, group)]

    def accepted(self, group: Group) -> list[Row]:
        return [row for row in self.rows if row.group == group and row.pair.outcome is Outcome.OK]

    @property
    def outcomes(self) -> Counter[Outcome]:
        return Counter(row.pair.outcome for row in self.rows)

    @cached_property
    def contrasts(self) -> dict[str, MeanContrast]:
        """Mean contrast of the training and of the held-out pairs, as far as there are any."""
        told = self.summary("create").get("contrast", {})
        means = {}
        for group in ("training", "held-out"):
            rows = self.accepted(group)
            if group == "training" and rows and told.keys() == _OF_A_MEAN:
                # to look for leaks in all pairs once more would take longer than the rest of the page
                means[group] = MeanContrast(**told)
            elif each := [
                completed(row.pair, row.jaccard, row.levenshtein)
                for row in rows
                if row.jaccard is not None and row.levenshtein is not None
            ]:
                means[group] = mean_contrast(each, told.get("tokenizer", "whitespace"))
        return means

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.run.metrics)

    @cached_property
    def trajectories(self) -> list[dict[str, Any]]:
        return read_lines(self.run.trajectories)

    @cached_property
    def boards(self) -> list[Scoreboard]:
        scores = _scores(self.run.scores)
        if odd := next((one for one in scores if not all(map(math.isfinite, (one.score, one.low, one.high)))), None):
            raise DataError(f"{self.run.scores}: {odd.checkpoint} has a score that is no number; evaluate again")
        return scoreboards(scores, self.evaluated)

    @cached_property
    def evaluated(self) -> Evaluated:
        return read_evaluated(self.summary("evaluate"), self.run.folder / "stages/evaluate.json")

    @property
    def remarks(self) -> Mapping[str, Mapping[str, Mapping[str, int]]]:
        return self.summary("evaluate").get("remarks", {})


def row_files(run: Run) -> dict[Group, Path]:
    """The files of rows that a run folder has."""
    files: dict[Group, Path] = {"training": run.pairs, "held-out": run.held_out, "refused": run.refused}
    return {group: path for group, path in files.items() if path.exists()}


def _scores(path: Path) -> list[Score]:
    """The whole lines that have all that a score has; a missing file has none."""
    shape = _score_lines()
    if not path.exists():
        return []
    try:
        # all at once takes a fifth of the time; a torn line, or one that lacks something, is no part of a list
        return shape.validate_json(b"[" + b",".join(filter(None, path.read_bytes().split(b"\n"))) + b"]")
    except ValidationError:
        names = {field.name for field in fields(Score)}
        lines = [line for line in read_lines(path) if names <= line.keys()]
    try:
        return shape.validate_python(lines)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(
            f"{path}: {first['loc'][-1]} {first['input']!r:.60} is none that an evaluation writes ({first['msg']}); "
            "evaluate again"
        ) from None


@cache
def _score_lines() -> TypeAdapter[list[Score]]:
    return TypeAdapter(list[Score])


def _rows(path: Path, group: Group) -> list[Row]:
    import pyarrow.parquet

    pairs = read_rows(path)
    known = [name for name in _NUMBERS if name in pyarrow.parquet.read_schema(path).names]
    numbers = pyarrow.parquet.read_table(path, columns=known).to_pylist() if known else [{}] * len(pairs)
    return [Row(pair, group, **measured) for pair, measured in zip(pairs, numbers, strict=True)]
