"""A run folder's tables for a terminal."""

from __future__ import annotations

from collections.abc import Collection

from anchored.report.contents import Contents
from anchored.report.evaluation_tables import evaluation_tables
from anchored.report.scoreboard import Scoreboard
from anchored.report.tables import (
    Table,
    contrast_table,
    improvement_table,
    remarks_table,
    score_table,
    yield_table,
)
from anchored.runs import Run


def run_tables(run: Run, stages: Collection[str]) -> list[Table]:
    """What the given stages of a run have to show, the scores in each benchmark's first view; the page has them all."""
    contents = Contents(run)
    tables = []
    if "create" in stages:
        tables += [yield_table(contents.outcomes), contrast_table(contents.contrasts)]
    if "evaluate" in stages:
        first: dict[str, Scoreboard] = {}
        for board in contents.boards:
            first.setdefault(board.benchmark, board)
        shown = [
            gain
            for gain in contents.evaluated.improvement
            if gain.category is None and gain.benchmark in first and gain.view == first[gain.benchmark].view
        ]
        tables += [*map(score_table, first.values()), improvement_table(shown)]
        tables += [*evaluation_tables(contents.evaluated), remarks_table(contents.remarks)]
    return [table for table in tables if table.rows]
