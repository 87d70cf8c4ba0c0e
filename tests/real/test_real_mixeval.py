"""MixEval-Hard's own files: both versions, recorded prompts, real answers, the arithmetic of the paper's Table 4."""

from __future__ import annotations

import asyncio
import csv
import gzip
import hashlib
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anchored.errors import EvaluationError
from anchored.evaluate import statistics
from anchored.evaluate.benchmark import Answered, Item
from anchored.evaluate.mixeval_files import COUNTS, Version, read_files, versions
from anchored.evaluate.mixeval_hard import NO_VERDICT, READ_PLAINLY, MixEvalHard
from anchored.evaluate.settings import EvaluateSettings
from anchored.llm.chat import Reply, Request

SHARED = Path(__file__).parents[3] / "shared"
DATA = Path(os.environ.get("ANCHORED_REAL_DATA") or SHARED / "data") / "mixeval"
RESPONSES = DATA / "gemma_1.1_7b_it_2024-06-01_hard_responses.jsonl.gz"
TABLE_4 = Path(os.environ.get("ANCHORED_REAL_TABLES") or SHARED / "spec" / "tables") / "table4_breakdown.csv"
SPLITS = {"freeform": "free-form", "multichoice": "multiple-choice"}

pytestmark = pytest.mark.skipif(not RESPONSES.exists(), reason=f"{RESPONSES} is missing (or set ANCHORED_REAL_DATA)")


def benchmark(version: Version = "2024-06-01", **mixeval: Any) -> MixEvalHard:
    judge = {"model": "judge", "most_failed": 1}
    return MixEvalHard(
        version, EvaluateSettings.model_validate({"judge": judge, "mixeval": {"data": str(DATA), **mixeval}})
    )


def recorded() -> list[dict[str, str]]:
    lines = gzip.decompress(RESPONSES.read_bytes()).decode().splitlines()
    return [{**line, "id": f"{SPLITS[line['split']]}/{line['id']}"} for line in map(json.loads, lines)]


@pytest.mark.parametrize(("version", "unique", "views"), [("2024-06-01", 446, "paper"), ("2024-08-11", 823, "without")])
def test_both_versions_are_the_official_ones(version: Version, unique: int, views: str) -> None:
    files = read_files(str(DATA), version)
    assert files.official
    assert len(files.rows) == 1000
    for split, counts in COUNTS[version].items():
        assert Counter(row.benchmark for row in files.rows if row.split == split) == counts
    found = benchmark(version)
    assert len({item.cluster for item in found.items()}) == unique
    assert found.views[0].name == "official"
    assert found.views[2].name.startswith(views)


def test_the_hold_out_leaves_out_what_the_older_version_asks() -> None:
    assert len(benchmark("2024-08-11").views[2].left_out) == 156


def test_the_paper_view_has_the_16_benchmarks_of_table_4() -> None:
    found = benchmark()
    apart = found.views[2].only_in_whole
    named = Counter(item.category for item in found.items() if item.id not in apart)
    with TABLE_4.open() as handle:
        table = {row["split"]: int(row["queries"]) for row in csv.DictReader(handle)}
    assert table.pop("Overall score") == sum(named.values()) == 988
    assert named == table


def test_the_prompts_of_the_thousand_rows_are_the_recorded_ones() -> None:
    prompts = {item.id: item.prompt.messages[0].content for item in benchmark().items()}
    rows = recorded()
    assert len(prompts) == len({row["id"] for row in rows}) == 1000
    wrong = [
        row["id"]
        for row in rows
        if hashlib.sha256(prompts[row["id"]].encode()).hexdigest() != row["formated_input_sha256"]
    ]
    assert wrong == []


@pytest.mark.parametrize("column", range(5))
def test_the_official_score_and_the_paper_view_have_the_numbers_of_table_4(column: int) -> None:
    # The table's shares make whole right answers and whole tenths of grades. The 12 rows that it leaves out are known
    # to a tenth of a point by its overall score alone, which is the official one over all 1000.
    with TABLE_4.open() as handle:
        rows = list(csv.DictReader(handle))
    name = list(rows[0])[2 + column]
    table = {row["split"]: float(row[name]) for row in rows}
    found = benchmark()
    apart = found.views[2].only_in_whole
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in found.items():
        groups["apart" if item.id in apart else item.category].append(item)
    grades: dict[str, float] = {}
    for category, items in groups.items():
        if category != "apart":
            grades |= spread(items, table[category])
            members = np.array([grades[item.id] for item in items])
            # 51.25 stands there as 51.3, and is 51.2 or 51.3 by the order in which tenths are added
            assert 100 * statistics.point(members, how(items, None)) == pytest.approx(table[category], abs=0.0501)
            if table[category] != 51.3:
                official = 100 * statistics.point(members, how(items, 3))
                assert official == pytest.approx(table[category], abs=1e-9)
    reached = set()
    for tenths in range(121):
        filled = {**grades, **spread(groups["apart"], tenths / 1.2)}
        ordered = np.array([filled[item.id] for item in found.items()])
        reached.add(round(100 * statistics.point(ordered, how(found.items(), 3)), 2))
    assert table["Overall score"] in reached


def spread(items: Sequence[Item], percent: float) -> dict[str, float]:
    """Grades with this mean, as far as tenths (free form) or right and wrong (multiple choice) can have it."""
    if items[0].stratum == "multiple-choice":
        right = round(percent * len(items) / 100)
        return {item.id: float(place < right) for place, item in enumerate(items)}
    whole, rest = divmod(round(percent * len(items) / 10), 10)
    return {item.id: 1.0 if place < whole else rest / 10 if place == whole else 0.0 for place, item in enumerate(items)}


def how(items: Sequence[Item], decimals: int | None) -> statistics.Design:
    return statistics.design([item.cluster for item in items], [item.stratum for item in items], decimals)


def test_real_answers_are_read_plainly_and_judged_once_per_question() -> None:
    found = benchmark(read_letters=True)
    items = {item.id: item for item in found.items()}
    answers = [Answered(items[row["id"]], row["response"]) for row in recorded()]
    judge = Silent()
    grades = asyncio.run(found.grade_all(answers, judge, lambda: None))
    read = [grade for grade in grades if READ_PLAINLY in grade.remarks]
    # of 500 all but the two that say "A. " and words of no option
    assert len(read) == 498
    assert sum(grade.grades["exact"] for grade in read if grade.grades) == 185
    left = [answer for answer, grade in zip(answers, grades, strict=True) if NO_VERDICT in grade.remarks]
    assert len(left) == 502
    # the same answer to the same question is one request, however often it stands in the files
    assert len(judge.requests) == len(set(judge.requests)) == 3 * len({(one.item.cluster, one.text) for one in left})
    assert not any("speaks to the judge" in grade.remarks for grade in grades)


class Silent:
    """A judge that says nothing of use."""

    name = fingerprint = "silent"

    def __init__(self) -> None:
        self.requests: list[Request] = []

    async def reply(self, request: Request) -> Reply:
        self.requests.append(request)
        return Reply("Hm.", "stop", self.name)

    async def close(self) -> None: ...


def test_a_naive_interval_is_much_too_narrow() -> None:
    # half right at random, equal questions answered equally: 446 clusters say less than 1000 rows
    found = benchmark()
    rng = np.random.default_rng(0)
    right = dict.fromkeys(item.cluster for item in found.items())
    drawn = dict(zip(right, (rng.random(len(right)) < 0.42).astype(float), strict=True))
    grades = np.array([drawn[item.cluster] for item in found.items()])
    clustered = statistics.score(grades, 2000, 0, how(found.items(), None))
    naive = statistics.score(grades, 2000, 0)
    assert 1.4 < (clustered.high - clustered.low) / (naive.high - naive.low) < 2
    assert (clustered.high - clustered.low) / 3.92 == pytest.approx(2.6, abs=0.3)


def test_a_changed_file_is_named(tmp_path: Path) -> None:
    for version in versions():
        shutil.copytree(DATA / version, tmp_path / version)
    file = tmp_path / "2024-06-01" / "mixeval-hard" / "free-form.json.gz"
    rows = json.loads(gzip.decompress(file.read_bytes()))
    del rows["17"]
    file.write_bytes(gzip.compress(json.dumps(rows, indent=4).encode()))
    with pytest.raises(
        EvaluationError, match=r"has 499 rows, not the 500 .* lacks 1 \(the first is 17\).*: \d+ of \d+"
    ):
        read_files(str(tmp_path), "2024-06-01")
    other = tmp_path / "2024-08-11" / "mixeval-hard" / "free-form.json.gz"
    shutil.copy(other, file)
    with pytest.raises(EvaluationError, match=r"is the free-form file of version 2024-08-11"):
        read_files(str(tmp_path), "2024-06-01")
