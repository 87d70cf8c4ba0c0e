"""The report stage: whatever a run folder holds so far in, one self-contained report.html out.

The page carries its script, its style, Plotly and the data; its policy forbids the browser to fetch anything. Texts of
the run reach it escaped (Jinja), or as JSON that the page shows as text. What the run has not made yet is left out,
with the command that makes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from anchored.report import overview
from anchored.report.charts import held_out_charts, histogram, score_chart, training_charts
from anchored.report.contents import Contents
from anchored.report.evaluation_tables import breakdown_table, evaluation_tables
from anchored.report.pages import content_policy, environment, styles
from anchored.report.pair_rows import choices, for_page, sample, tally
from anchored.report.tables import contrast_table, improvement_table, remarks_table, yield_table
from anchored.runs import Run, write_text

_HERE = Path(__file__).parent


def report(run: Run) -> Path:
    """Write the run's report.html from the files in its folder, and return its path."""
    write_text(run.report, _page(Contents(run)))
    return run.report


def _page(contents: Contents) -> str:
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    training, held_out = training_charts(contents.metrics), held_out_charts(contents.trajectories)
    scores = {board: score_chart(board, number) for number, board in enumerate(contents.boards) if board.trained}
    histograms = _histograms(contents)
    charts = [*scores.values(), *histograms, *held_out, *training]
    pairs = sample(contents.rows)
    data = {
        "charts": [{"id": chart.id, "data": chart.data, "layout": chart.layout} for chart in charts],
        "rows": [for_page(row) for row in pairs.rows],
    }
    plotly = [get_plotlyjs()] if charts else []
    scripts = [*plotly, *((_HERE / name).read_text("utf-8") for name in ("pair.js", "page.js"))]
    gains = contents.evaluated.improvement
    return (
        environment()
        .get_template("page.html")
        .render(
            title=contents.run.folder.resolve().name,
            lede=overview.lede(contents),
            tiles=overview.tiles(contents),
            facts=overview.facts(contents),
            gaps=overview.gaps(contents),
            recipe=contents.recipe_text,
            boards=contents.boards,
            score_charts=scores,
            improvement=improvement_table(gain for gain in gains if gain.category is None),
            improvement_by_category=improvement_table(gain for gain in gains if gain.category is not None),
            evaluation=evaluation_tables(contents.evaluated),
            breakdowns={board: breakdown_table(board) for board in contents.boards},
            remarks=remarks_table(contents.remarks),
            yields=yield_table(contents.outcomes),
            contrast=contrast_table(contents.contrasts),
            histograms=histograms,
            pairs=pairs,
            choices=choices(tally(pairs.rows)),
            training=training,
            held_out=held_out,
            data=Markup(_json_for_script(data)),
            style=Markup(styles()),
            scripts=[Markup(script) for script in scripts],
            content_policy=content_policy(scripts),
        )
    )


def _histograms(contents: Contents) -> list[Any]:
    rows = contents.accepted("training")
    charts = [
        histogram(
            "jaccard", "Jaccard similarity", "tokens in common, percent", _known(row.jaccard for row in rows), (0, 100)
        ),
        histogram(
            "distance",
            "Levenshtein distance",
            "characters to edit, per character of the longer answer",
            _known(row.normalised for row in rows),
            (0, 1),
        ),
        histogram(
            "length-ratio",
            "Length ratio",
            "characters of the chosen answer per character of the rejected one",
            _known(row.length_ratio for row in rows),
        ),
    ]
    return [chart for chart in charts if chart]


def _known(numbers: Iterable[float | None]) -> list[float]:
    return [number for number in numbers if number is not None]


def _json_for_script(value: Any) -> str:
    """JSON that can stand in a script element: no character of it can end the element or the line."""
    text = json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _finite(value: Any) -> Any:
    """The value with null for what JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return value
