"""Runs side by side: the paper's tables from runs that have its numbers, and what may be compared with what."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compared_runs import (
    ALPACA,
    BEST,
    JUDGE,
    ME_0601,
    ME_0811,
    TABLE_2,
    TABLE_4,
    TABLE_5,
    Known,
    improvement,
    known_run,
    paper_runs,
    recipe,
    scored,
    table,
    write_run,
)

from anchored.errors import DataError
from anchored.recipe import shaping
from anchored.report.compare import Comparison, compare
from anchored.report.compare_files import comparison_csv, comparison_latex, differences_csv, escaped, latex_table
from anchored.report.compare_tables import (
    Grid,
    breakdown_grid,
    conclusion,
    difference_table,
    improvement_grids,
    improvement_notes,
    sheet_notes,
    terminal_tables,
)
from anchored.report.differences import differences

# what the paper sets in bold and what it underlines, in Table 2 and in Table 5
BOLD_2 = {("clair", "apo-zero", n) for n in (0, 1, 2, 3)} | {("judge-on-policy", "apo-down", 4)}
UNDERLINED_2 = {
    *(("judge-off-policy", "apo-down", n) for n in (0, 1, 2, 3)),
    ("judge-off-policy", "dpo", 4),
    ("judge-on-policy", "apo-zero", 0),
    ("judge-on-policy", "apo-down", 1),
    ("judge-on-policy", "apo-zero", 2),
    ("judge-on-policy", "apo-down", 3),
    ("clair", "apo-zero", 4),
    *(("stronger-preferred", "sft", n) for n in (0, 1, 2, 3, 4)),
}
BOLD_5 = {("judge-on-policy", "apo-zero-unpaired", 0), *(("clair", "kto", n) for n in (1, 2, 3))}


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return compare(paper_runs(tmp_path_factory.mktemp("paper")), shaping)


def numbers(text: str) -> list[float]:
    plain = text.replace("−", "-").replace(",", "")
    return [float(one) for one in re.findall(r"-?\d*\.?\d+", plain)]


def marked(grid: Grid, mark: str) -> set[tuple[str, str, int]]:
    return {
        (*line.labels[:2], place) for line in grid.lines for place, cell in enumerate(line.cells) if cell.mark == mark
    }


def plain_grades(start: float, *ups: float, items: int = 60, seed: int = 0) -> np.ndarray:
    """Grades of a starting model and checkpoints, each item right with some chance, hard ones hard for all."""
    rng = np.random.default_rng(seed)
    hardness = np.random.default_rng(77).random(items)
    chances = [start, *(start + up for up in ups)]
    return np.stack([(hardness + rng.normal(0, 0.1, items) < chance).astype(float) for chance in chances])


def compared(*runs: Known | Path, **how: Any) -> Comparison:
    return compare([run.folder if isinstance(run, Known) else run for run in runs], shaping, **how)


# the paper's tables


def test_the_papers_table_2_comes_out_with_its_marks(paper: Comparison) -> None:
    grid = improvement_grids(paper)[0]
    assert [(column.over, column.name) for column in grid.columns] == [
        (ME_0601, "max Δ"),
        (ME_0601, "mean Δ (sd)"),
        (ME_0811, "max Δ"),
        (ME_0811, "mean Δ (sd)"),
        (ALPACA, "chosen Δ"),
        (ALPACA, "length Δ"),
    ]
    found = {
        line.labels: [number for cell in line.cells for number in numbers(f"{cell.text} {cell.after}")]
        for line in grid.lines
    }
    assert found == {(data, objective): [float(one) for one in rest] for data, objective, *rest in table(TABLE_2)}
    assert marked(grid, "**") == BOLD_2
    assert marked(grid, "*") == UNDERLINED_2


def test_the_papers_table_5_comes_out_with_its_training_times(paper: Comparison) -> None:
    grid = improvement_grids(paper)[1]
    found = {
        line.labels: [number for cell in line.cells[:4] for number in numbers(f"{cell.text} {cell.after}")]
        for line in grid.lines
    }
    assert found == {(data, objective): [float(one) for one in rest[:6]] for data, objective, *rest in table(TABLE_5)}
    assert marked(grid, "**") == BOLD_5
    times = {line.labels: line.cells[-1].text for line in grid.lines}
    assert times["clair", "kto"] == "17 h 33 min"
    assert times["clair", "apo-zero-unpaired"] == "12 h 31 min"


def test_the_papers_table_4_comes_out_for_the_best_run_of_each_data_set(paper: Comparison) -> None:
    grid = breakdown_grid(paper, paper.sheets[0])
    assert grid is not None
    places = {column.over: place for place, column in enumerate(grid.columns)}
    assert {data: grid.columns[places[data]].name for data in BEST} == {
        data: f"{objective} (epoch-07)" for data, objective in BEST.items()
    }
    order = (0, *(places[data] for data in BEST))
    found = {line.labels[0]: [line.cells[place].text for place in order] for line in grid.lines}
    assert found.pop("overall") == ["41.45", "49.10", "46.10", "44.15", "43.90"]
    assert found == {split: rest for split, _, *rest in table(TABLE_4)}
    assert [line.labels[1] for line in grid.lines[1:4]] == ["267", "231", "167"]
    bold = {line.labels[0]: [cell.text for cell in line.cells if cell.mark] for line in grid.lines}
    assert bold["MMLU"] == ["43.70"]
    assert bold["MBPP"] == ["0.00"] * 5


def test_a_row_of_few_is_broken_down_whether_it_is_the_best_or_not(paper: Comparison) -> None:
    few = replace(paper, rows=tuple(row for row in paper.rows if row.data == "clair")[:4])
    grid = breakdown_grid(few, paper.sheets[0])
    assert grid is not None
    assert [column.over for column in grid.columns] == ["", *["clair"] * 4]


def test_latex_sets_the_papers_rows(paper: Comparison) -> None:
    text = comparison_latex(paper, intervals=False)
    assert r" & apo-zero & \textbf{\boldmath 7.65} & \textbf{\boldmath 2.93} (1.98) & \textbf{\boldmath 5.95}" in text
    assert r" & apo-down & \underline{2.70} & \underline{0.64} (0.98)" in text.replace("judge-off-policy", "")
    assert r"& $-$22.29 & 12,669 \\" in text


def test_the_csv_has_every_number_in_a_column_of_its_own(paper: Comparison) -> None:
    lines = list(csv.DictReader(io.StringIO(comparison_csv(paper))))
    whole = {(line["data"], line["objective"], line["benchmark"]): line for line in lines if not line["category"]}
    assert len(whole) == 20 * 3 + 8 * 2
    line = whole["clair", "apo-zero", ME_0601]
    expected = {"max_gain": 7.65, "mean_gain": 2.93, "sd_over_checkpoints": 1.98, "start": 41.45, "best": 41.45 + 7.65}
    assert {name: float(line[name]) for name in expected} == expected
    assert (float(line["max_gain_low"]), float(line["max_gain_high"])) == (7.65 - 3, 7.65 + 3)
    assert float(whole["clair", "apo-zero", ALPACA]["chosen_gain"]) == 5.08
    assert float(whole["clair", "apo-zero", ALPACA]["length_change"]) == 520
    assert whole["clair", "apo-zero", ALPACA]["chosen_checkpoints"] == "epoch-06 + epoch-07"
    assert float(whole["clair", "kto", ME_0601]["train_seconds"]) == 17 * 3600 + 33 * 60 + 24
    split = next(one for one in lines if one["category"] == "TriviaQA" and one["data"] == "clair")
    assert (float(split["start"]), float(split["best"]), int(split["n"])) == (34.3, 49.2, 267)


# rows


def test_runs_that_differ_in_seeds_alone_are_one_row(tmp_path: Path) -> None:
    gains = (0.1, 0.2, 0.33)
    runs = [
        known_run(tmp_path / f"r{n}", recipe("clair", "dpo", train__seed=n), plain_grades(0.4, up, up + 0.05, seed=n))
        for n, up in enumerate(gains)
    ]
    found = compared(*runs)
    (row,), (sheet,) = found.rows, found.sheets
    result = found.result(row, sheet)
    assert result is not None
    each = [100 * (run.grades[1:].mean() - run.grades[0].mean()) for run in runs]
    assert result.runs == 3
    assert result.mean.value == pytest.approx(sum(each) / 3)
    spread = (sum((one - sum(each) / 3) ** 2 for one in each) / 2) ** 0.5
    assert result.mean.between == pytest.approx(spread)
    lows = [np.quantile(run.gains([1, 2]), 0.025) for run in runs]
    assert result.mean.low == pytest.approx(sum(lows) / 3)
    grid = improvement_grids(found)[0]
    assert grid.labels == ("data set", "objective", "runs")
    assert f"±{spread:.2f}" in grid.lines[0].cells[1].under
    apart = compared(*runs, each=True)
    assert [row.settings for row in apart.rows] == ["r0", "r1", "r2"]


def test_what_tells_rows_apart_stands_in_them_and_the_rest_does_not(tmp_path: Path) -> None:
    settings = {
        "a": recipe("clair", "dpo"),
        "b": recipe("clair", "dpo", train__objective__beta=0.3, train__device="cuda"),
        "c": recipe("clair", "dpo", train__optimizer__lr=1e-6, train__seed=3),
        "d": recipe("clair", "dpo", train__seed=1, train__device="cpu", versions__python="3.12"),
        "e": recipe("clair", "apo-zero", train__objective__beta=5.0),
    }
    runs = [known_run(tmp_path / n, one, plain_grades(0.4, 0.1, seed=ord(n))) for n, one in settings.items()]
    found = compared(*runs)
    rows = {row.name: [entry.name for entry in row.entries] for row in found.rows}
    assert rows == {
        "clair · dpo · beta=0.1, lr=2e-07": ["a", "d"],
        "clair · dpo · beta=0.3, lr=2e-07": ["b"],
        "clair · dpo · beta=0.1, lr=1e-06": ["c"],
        "clair · apo-zero": ["e"],
    }
    assert found.differing["train.objective.beta"]["e"] == "5"
    assert "train.device" not in found.differing


def test_settings_of_stages_and_roles_that_a_run_does_not_use_make_no_row(tmp_path: Path) -> None:
    settings = {
        "a": recipe("clair", "dpo", train__data="org/pairs"),
        "b": recipe("clair", "dpo", train__data="org/pairs", train__seed=1, create__sample={"top_p": 0.5}),
        "c": recipe("clair", "dpo", create__judge={"model": "one"}),
        "d": recipe("clair", "dpo", train__seed=1, create__judge={"model": "other"}),
    }
    runs = [known_run(tmp_path / n, one, plain_grades(0.4, 0.1, seed=ord(n))) for n, one in settings.items()]
    rows = {row.name: [entry.name for entry in row.entries] for row in compared(*runs).rows}
    assert rows == {"pairs · dpo": ["a", "b"], "clair · dpo": ["c", "d"]}


def test_what_a_benchmark_is_asked_with_makes_rows_where_it_is_asked(tmp_path: Path) -> None:
    ways = {"short": 256, "long": 1024}
    rows = {}
    for version in ("lm-eval 0.4.13, version 3", "v1"):
        runs = [
            known_run(
                tmp_path / version / name,
                recipe("clair", "dpo", train__seed=most, evaluate__lm_eval={"max_tokens": most}),
                plain_grades(0.4, 0.1, seed=most),
                version=version,
            )
            for name, most in ways.items()
        ]
        rows[version] = [row.name for row in compared(*runs).rows]
    assert rows == {
        "lm-eval 0.4.13, version 3": ["clair · dpo · lm_eval.max_tokens=256", "clair · dpo · lm_eval.max_tokens=1024"],
        "v1": ["clair · dpo"],
    }


def test_a_section_that_only_some_have_is_named_once(tmp_path: Path) -> None:
    lora = {"rank": 16, "alpha": 32.0}
    settings = {
        "full": recipe("clair", "dpo", train__lora=None),
        "lora": recipe("clair", "dpo", train__lora=lora),
        "more": recipe("clair", "dpo", train__lora={**lora, "rank": 64}),
    }
    runs = [known_run(tmp_path / n, one, plain_grades(0.4, 0.1)) for n, one in settings.items()]
    rows = {row.entries[0].name: row.settings for row in compared(*runs).rows}
    assert rows == {"full": "lora=null", "lora": "rank=16, with lora", "more": "rank=64, with lora"}


def test_data_of_another_run_is_called_by_the_method_that_made_it(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    origin = known_run(tmp_path / "made", recipe("stronger-preferred", "sft"), plain_grades(0.4, 0.1))
    (origin.folder / "pairs.parquet").touch()
    of_run = known_run(tmp_path / "b", recipe("clair", "dpo", train__data="made/pairs.parquet"), plain_grades(0.4, 0.2))
    hub = known_run(tmp_path / "c", recipe("clair", "dpo", train__data="org/uf_clair"), plain_grades(0.4, 0.2))
    same = known_run(tmp_path / "d", recipe("clair", "dpo", train__data="other/uf_clair"), plain_grades(0.4, 0.2))
    assert [row.data for row in compared(of_run, hub, same).rows] == [
        "stronger-preferred",
        "org/uf_clair",
        "other/uf_clair",
    ]
    assert [row.data for row in compared(hub).rows] == ["uf_clair"]


def test_runs_of_the_same_name_get_as_much_of_their_path_as_tells_them_apart(tmp_path: Path) -> None:
    runs = [
        known_run(tmp_path / one / "run", recipe("clair", "dpo", train__objective__beta=n + 1), plain_grades(0.4, 0.1))
        for n, one in enumerate("ab")
    ]
    assert [entry.name for entry in compared(*runs).entries] == ["a/run", "b/run"]


# folders with which nothing can be done


def test_a_folder_without_anything_to_compare_is_named_with_its_way_out_and_the_others_stand(tmp_path: Path) -> None:
    good = known_run(tmp_path / "good", recipe("clair", "dpo"), plain_grades(0.4, 0.2))
    copy = tmp_path / "copy"
    shutil.copytree(good.folder, copy)
    unscored = known_run(tmp_path / "unscored", recipe("clair", "dpo"), plain_grades(0.4, 0.2)).folder
    (unscored / "scores.jsonl").unlink()
    cut = known_run(tmp_path / "cut", recipe("clair", "dpo"), plain_grades(0.4, 0.2)).folder
    (cut / "stages/evaluate.json").unlink()
    torn = known_run(tmp_path / "torn", recipe("clair", "dpo"), plain_grades(0.4, 0.2)).folder
    (torn / "stages/evaluate.json").write_text('{"improvement": [')
    odd = known_run(tmp_path / "odd", recipe("clair", "dpo"), plain_grades(0.4, 0.2)).folder
    summary = json.loads((odd / "stages/evaluate.json").read_text())
    summary["improvement"][0]["mean"]["value"] = float("nan")
    (odd / "stages/evaluate.json").write_text(json.dumps(summary))
    worded = known_run(tmp_path / "worded", recipe("clair", "sft"), plain_grades(0.4, 0.2)).folder
    lines = (worded / "scores.jsonl").read_text()
    (worded / "scores.jsonl").write_text(re.sub(r'"score": [\d.]+', '"score": "high"', lines))
    start = write_run(tmp_path / "start", recipe("clair", "dpo"), scored("quiz", "grade", 40, 50)[:1], {}).folder
    broken = known_run(tmp_path / "broken", recipe("clair", "dpo"), plain_grades(0.4, 0.2)).folder
    (broken / "recipe.yaml").write_text("policy: [")
    empty, file = tmp_path / "empty", tmp_path / "file.txt"
    empty.mkdir()
    file.touch()
    bad = [copy, unscored, cut, torn, odd, worded, start, broken, empty, file, tmp_path / "nowhere", tmp_path]
    found = compared(good, *bad, tmp_path / "empty/../good")
    assert [entry.name for entry in found.entries] == ["good"]
    told = dict(zip([*map(str, bad), "twice"], found.left_out, strict=True))
    expected = {
        copy: "a copy of",
        unscored: f"has no scores yet; `anchored evaluate RECIPE --out {unscored}` makes them",
        cut: "its evaluation has not come to its end",
        torn: "not readable",
        odd: "improvement.0.mean.value is nan",
        worded: "score 'high'",
        start: "only its starting model is scored",
        broken: "not a readable recipe",
        empty: "not a run folder",
        file: "a file, not a run folder",
        tmp_path / "nowhere": "no such folder",
        tmp_path: f"give the run folders in it: {tmp_path}/*",
    }
    for path, text in expected.items():
        assert text in told[str(path)], path
        assert str(path) in told[str(path)]
    assert "the same run as" in told["twice"]
    with pytest.raises(DataError, match=r"no such folder"):
        compared(tmp_path / "nowhere")


def test_an_unfinished_training_is_compared_and_said(tmp_path: Path) -> None:
    run = known_run(tmp_path / "a", recipe("clair", "dpo"), plain_grades(0.4, 0.2))
    (run.folder / "metrics.jsonl").write_text("{}\n")
    (run.folder / "stages/train.json").unlink()
    assert "its training has not come to its end" in compared(run).notes[0]


# sheets


def test_scores_by_other_judges_versions_or_limits_stand_apart(tmp_path: Path) -> None:
    grades = plain_grades(0.4, 0.2)
    runs = [
        known_run(tmp_path / "a", recipe("clair", "dpo"), grades),
        known_run(tmp_path / "b", recipe("clair", "apo-zero"), grades, judge="another <judge>"),
        known_run(tmp_path / "c", recipe("clair", "sft"), grades, version="v2"),
        known_run(tmp_path / "d", recipe("clair", "kto-pair", limit=60), grades),
    ]
    found = compared(*runs)
    assert [sheet.judge for sheet in found.sheets] == [JUDGE, "another <judge>", JUDGE, JUDGE]
    grid = improvement_grids(found)[0]
    over = list(dict.fromkeys(column.over for column in grid.columns))
    assert over == ["quiz (a)", "quiz (b)", "quiz (c)", "quiz (d)", ""]
    assert all(sum(bool(cell.text) for cell in line.cells) == 3 for line in grid.lines)  # its own two, and the time
    assert differences(found).fields == ()
    assert any("does not" in note or "do not compare" in note for note in sheet_notes(found))


def test_other_starting_models_are_named_with_their_scores(tmp_path: Path) -> None:
    one = known_run(tmp_path / "a", recipe("clair", "dpo"), plain_grades(0.4, 0.2))
    other = known_run(tmp_path / "b", recipe("clair", "dpo", policy__model="org/other"), plain_grades(0.6, 0.2))
    found = compared(one, other)
    assert [row.policy for row in found.rows] == ["meta-llama/Meta-Llama-3-8B-Instruct", "org/other"]
    assert "start from 2 models" in found.notes[0]
    scores = [f"{100 * run.grades[0].mean():.2f}" for run in (one, other)]
    assert all(score in found.notes[1] for score in scores)
    assert "start" in improvement_grids(found)[0].labels


def test_a_view_is_shown_where_a_benchmark_has_it(tmp_path: Path) -> None:
    rows = [improvement(ME_0601, "official", 1, 0.5, 0.1), improvement(ME_0601, "exact", 2, 1.5, 0.2)]
    rows.append(improvement("quiz", "grade", 3, 2.5, 0.3))
    scores = [*scored(ME_0601, "official", 40, 41), *scored(ME_0601, "exact", 40, 42), *scored("quiz", "grade", 40, 43)]
    run = write_run(tmp_path / "a", recipe("clair", "dpo"), scores, {"improvement": rows})
    sheets = {views: compared(run.folder, views=views).sheets for views in ((), ("exact",))}
    shown = {views: [(sheet.benchmark, sheet.view) for sheet in found] for views, found in sheets.items()}
    assert shown == {
        (): [(ME_0601, "official"), ("quiz", "grade")],
        ("exact",): [(ME_0601, "exact"), ("quiz", "grade")],
    }
    assert len(compared(run.folder, views=("exact", "official")).sheets) == 3
    # nor is another view the first where one run could not have that one
    lacking = write_run(
        tmp_path / "lacking",
        recipe("clair", "dpo"),
        scored(ME_0601, "exact", 41.0, 44.0),
        {"improvement": [improvement(ME_0601, "exact", 3.0, 2.0, 1.0)]},
    )
    assert {sheet.view for sheet in compared(lacking.folder, run.folder).sheets if sheet.benchmark == ME_0601} == {
        "official"
    }
    with pytest.raises(DataError, match=r"--view strict: .*official, exact, grade"):
        compared(run.folder, views=("strict",))


# differences


@pytest.fixture
def rivals(tmp_path: Path) -> dict[str, Known]:
    ups = {"far": 0.3, "near": 0.06, "nearer": 0.05}
    return {
        name: known_run(
            tmp_path / name,
            recipe("clair", "dpo", train__objective__beta=up),
            plain_grades(0.4, up, up + 0.02, up - 0.02, seed=n),
            chosen=["epoch-02", "epoch-03"],
        )
        for n, (name, up) in enumerate(ups.items())
    }


def test_differences_are_paired_over_the_questions_of_each_resample(rivals: dict[str, Known]) -> None:
    found = differences(compared(*rivals.values()))
    assert [(field.of, field.on) for field in found.fields] == [("mean", None), ("chosen", "other")]
    assert found.notes == ()
    for field, places in zip(found.fields, ([1, 2, 3], [2, 3]), strict=True):
        gains = {name: run.gains(places) for name, run in rivals.items()}
        values = {name: 100 * (run.grades[places].mean() - run.grades[0].mean()) for name, run in rivals.items()}
        names = [row.entries[0].name for row in field.rows]
        assert names == sorted(names, key=lambda name: -values[name])
        for pair in field.pairs:
            better, worse = names[pair.better], names[pair.worse]
            ends = np.quantile(gains[better] - gains[worse], [0.025, 0.975])
            assert pair.points.value == pytest.approx(values[better] - values[worse])
            assert (pair.points.low, pair.points.high) == (pytest.approx(ends[0]), pytest.approx(ends[1]))
            assert pair.holds == (ends[0] > 0)
    of_mean = found.fields[0]
    names = [row.entries[0].name for row in of_mean.rows]
    verdicts = {(names[pair.better], names[pair.worse]): pair.holds_among_all for pair in of_mean.pairs}
    assert verdicts["far", "near"]
    assert verdicts["far", "nearer"]
    assert sum(verdicts.values()) == 2
    best = "clair · dpo · beta=0.3"
    others = "clair · dpo · beta=0.06, clair · dpo · beta=0.05"
    assert conclusion(of_mean) == f"{best} gains most. More than chance? Yes, among all, against {others}."
    level = replace(of_mean, improvements=(2.0, 2.0, 1.0))
    assert conclusion(level).startswith(f"{best}, {of_mean.rows[1].name} gain most. More than chance? ")
    assert conclusion(level).endswith(f"against {of_mean.rows[2].name}.")
    assert conclusion(replace(of_mean, improvements=(2.0,) * 3)) == f"{best}, {others} gain the same."


def test_a_row_of_several_runs_is_compared_by_their_mean(tmp_path: Path) -> None:
    twins = [
        known_run(tmp_path / f"t{n}", recipe("clair", "dpo", train__seed=n), plain_grades(0.4, 0.2, seed=n))
        for n in (0, 1)
    ]
    other = known_run(tmp_path / "o", recipe("clair", "apo-zero"), plain_grades(0.4, 0.05, seed=5))
    (field,) = differences(compared(*twins, other)).fields
    (pair,) = field.pairs
    drawn = (twins[0].gains([1]) + twins[1].gains([1])) / 2 - other.gains([1])
    assert (pair.points.low, pair.points.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))


def test_with_nothing_to_tell_rows_apart_the_verdict_among_all_is_rarely_wrong(tmp_path: Path) -> None:
    wrong_by_itself = wrong_among_all = 0
    for trial in range(12):
        runs = []
        for n in range(6):
            rng = np.random.default_rng([trial, n])
            grades = (rng.random((2, 80)) < 0.5).astype(float)
            grades[0] = 0.5
            folder = tmp_path / f"{trial}-{n}"
            runs.append(known_run(folder, recipe("clair", "dpo", train__objective__beta=n + 1), grades))
        (field,) = differences(compared(*runs)).fields
        wrong_by_itself += any(pair.holds for pair in field.pairs)
        wrong_among_all += any(pair.holds_among_all for pair in field.pairs)
    assert wrong_among_all <= 3
    assert wrong_by_itself > wrong_among_all


def test_rows_of_other_draws_are_compared_among_themselves_alone(tmp_path: Path, rivals: dict[str, Known]) -> None:
    apart = [
        known_run(tmp_path / f"s{n}", recipe("clair", objective, evaluate__seed=9), plain_grades(0.4, 0.1), seed=9)
        for n, objective in enumerate(("sft", "apo-zero"))
    ]
    found = differences(compared(*rivals.values(), *apart))
    of_mean = [{row.entries[0].name for row in field.rows} for field in found.fields if field.of == "mean"]
    assert of_mean == [set(rivals), {"s0", "s1"}]
    assert "no paired difference between rows of different resamples" in found.notes[0]


def test_a_row_whose_runs_drew_differently_has_no_difference_and_says_so(
    tmp_path: Path, rivals: dict[str, Known]
) -> None:
    twins = [
        known_run(
            tmp_path / f"t{n}", recipe("clair", "sft", train__seed=n, evaluate__seed=n), plain_grades(0.4, 0.1), seed=n
        )
        for n in (0, 1)
    ]
    found = differences(compared(*rivals.values(), *twins))
    assert all(row.objective != "sft" for field in found.fields for row in field.rows)
    assert "the runs of clair · sft do not share their resamples" in found.notes[0]
    assert "evaluate.seed" in found.notes[0]


def test_resamples_that_are_missing_or_broken_cost_the_difference_alone(rivals: dict[str, Known]) -> None:
    (rivals["near"].folder / "resamples.npz").write_bytes(b"no archive")
    (rivals["nearer"].folder / "resamples.npz").unlink()
    found = compared(*rivals.values())
    between = differences(found)
    assert len(found.rows) == 3
    assert between.fields == ()
    assert any(note.startswith("near: resamples.npz cannot be read") for note in between.notes)
    assert any(note.startswith("nearer: no resamples.npz") and "--redo evaluate" in note for note in between.notes)


def test_a_pickle_in_the_resamples_is_never_opened(rivals: dict[str, Known]) -> None:
    class Planted:
        def __reduce__(self) -> Any:
            return (print, ("planted",))

    path = rivals["near"].folder / "resamples.npz"
    with open(path, "wb") as file:
        np.savez(file, meta=np.array([Planted()], dtype=object))
    assert any("near: resamples.npz cannot be read" in note for note in differences(compared(*rivals.values())).notes)


def test_chosen_checkpoints_are_not_paired_where_shared_questions_are_left_out(tmp_path: Path) -> None:
    runs = [
        known_run(
            tmp_path / f"{n}",
            recipe("clair", "dpo", train__objective__beta=n + 1),
            plain_grades(0.4, 0.1, 0.2, seed=n),
            chosen=["epoch-01"],
            left_out=7,
        )
        for n in (0, 1)
    ]
    assert [field.of for field in differences(compared(*runs)).fields] == ["mean"]


def test_rows_that_never_differ_are_not_told_apart(tmp_path: Path) -> None:
    grades = plain_grades(0.4, 0.2)
    runs = [known_run(tmp_path / o, recipe("clair", o), grades) for o in ("dpo", "apo-zero")]
    found = compared(*runs)
    (field,) = differences(found).fields
    assert difference_table(field, found.sheets).rows[0][2:] == ("+0.00", "[+0.00, +0.00]", "cannot be told")


def test_differences_have_a_csv_of_their_own(rivals: dict[str, Known]) -> None:
    found = differences(compared(*rivals.values()))
    lines = list(csv.DictReader(io.StringIO(differences_csv(found))))
    assert len(lines) == 6
    assert [float(line["points"]) for line in lines[:3]] == [pair.points.value for pair in found.fields[0].pairs]
    assert {line["more_than_chance_among_all"] for line in lines} <= {"True", "False"}


# words and LaTeX


def test_notes_say_what_the_columns_mean_and_only_of_those_that_are_there(paper: Comparison) -> None:
    grids = improvement_grids(paper)
    of_2, of_5 = (" ".join(improvement_notes(paper, [grid], "bold")) for grid in grids)
    assert "best of 18 checkpoints" in of_2
    assert "flatters" in of_2
    assert "chosen Δ" in of_2
    assert "chosen Δ" not in of_5
    without = improvement_grids(paper, intervals=False)
    assert "intervals" not in " ".join(improvement_notes(paper, without, "bold"))
    assert not any(cell.under for grid in without for line in grid.lines for cell in line.cells)


def test_latex_is_well_formed(paper: Comparison, rivals: dict[str, Known]) -> None:
    for text in (comparison_latex(paper), comparison_latex(compared(*rivals.values()))):
        bare = re.sub(r"\\[{}&%$#_]", "", text)
        assert bare.count("{") == bare.count("}")
        for body in re.findall(r"\\begin\{tabular\}\{([lr]+)\}(.*?)\\end\{tabular\}", bare, re.DOTALL):
            for line in body[1].split("\n"):
                if "&" in line:
                    spanned = sum(int(width) - 1 for width in re.findall(r"\\multicolumn\{(\d+)\}", line))
                    assert line.count("&") + 1 + spanned == len(body[0]), line


HOSTILE = 'a_b & 50% #1 {x} $y$ ~^ \\input{/etc/passwd} <b> | "q" é ł 中 \x07 −1'


def test_latex_has_no_command_of_a_name() -> None:
    text = escaped(HOSTILE)
    assert r"\textbackslash{}input\{/etc/passwd\}" in text
    assert r"a\_b \& 50\% \#1 \{x\} \$y\$" in text
    assert "U+4E2D" in text
    assert "é ł" in text
    assert "\x07" not in text


def test_latex_compiles(paper: Comparison, tmp_path: Path) -> None:
    if not shutil.which("pdflatex"):
        pytest.skip("needs pdflatex with booktabs (Debian: apt-get install texlive-latex-recommended)")
    grid = improvement_grids(paper)[0]
    hostile = replace(grid, title=HOSTILE, note=HOSTILE)
    tables = comparison_latex(paper) + latex_table(hostile)
    (tmp_path / "t.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs,graphicx}\\begin{document}" + tables + "\\end{document}", "utf-8"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


def test_the_terminal_gets_the_tables_in_the_papers_order(paper: Comparison, rivals: dict[str, Known]) -> None:
    titles = [one.title for one in terminal_tables(paper, differences(paper))]
    assert titles == [
        "Improvement on the starting model",
        "Improvement, objectives on single answers",
        f"Breakdown: {ME_0601}",
    ]
    found = compared(*rivals.values())
    assert [one.title for one in terminal_tables(found, differences(found))][1:] == [
        "Differences: quiz, mean over checkpoints",
        "Differences: quiz, checkpoints chosen on other",
    ]


# what may be told of checkpoints chosen elsewhere


def test_where_another_view_asks_just_the_questions_that_are_left_its_resamples_are_taken(tmp_path: Path) -> None:
    runs = {}
    for n, objective in enumerate(("dpo", "apo-zero")):
        run = known_run(
            tmp_path / objective,
            recipe("clair", objective),
            plain_grades(0.4, 0.1 + n / 5, 0.2 + n / 5, seed=n),
            chosen=["epoch-02"],
        )
        runs[objective] = run
        path = run.folder / "stages/evaluate.json"
        summary = json.loads(path.read_text())
        (rest,) = summary["chosen"]
        whole = {**rest, "view": "grade", "left_out": 9}
        summary["chosen"] = [whole, {**rest, "view": "rest"}]
        path.write_text(json.dumps(summary))
        resamples = run.folder / "resamples.npz"
        with np.load(resamples) as stored:
            meta = json.loads(stored["meta"].tobytes())
            arrays = {"quiz\tgrade": stored["quiz\tgrade"] + 1, "quiz\trest": stored["quiz\tgrade"]}
        meta["draws"]["quiz\trest"] = "of the rest"
        with open(resamples, "wb") as file:
            np.savez(file, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays)  # type: ignore[arg-type]
    of_chosen = next(field for field in differences(compared(*runs.values())).fields if field.of == "chosen")
    (pair,) = of_chosen.pairs
    drawn = runs["apo-zero"].gains([2]) - runs["dpo"].gains([2])
    assert (pair.points.low, pair.points.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))


def test_resamples_that_drew_nothing_graded_are_left_out_for_all(rivals: dict[str, Known]) -> None:
    path = rivals["near"].folder / "resamples.npz"
    with np.load(path) as stored:
        arrays = {name: stored[name].copy() for name in stored.files}
    arrays["quiz\tgrade"][:7] = np.nan
    with open(path, "wb") as file:
        np.savez(file, **arrays)
    field = differences(compared(*rivals.values())).fields[0]
    names = [row.entries[0].name for row in field.rows]
    pair = field.between(names.index("far"), names.index("nearer"))
    drawn = (rivals["far"].gains([1, 2, 3]) - rivals["nearer"].gains([1, 2, 3]))[7:]
    assert (pair.points.low, pair.points.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))


def test_checkpoints_that_were_not_chosen_alike_are_named(tmp_path: Path) -> None:
    runs = [
        known_run(
            tmp_path / str(n),
            recipe("clair", "dpo", train__objective__beta=n + 1),
            plain_grades(0.4, 0.1, 0.2, seed=n),
            chosen=["epoch-01", "epoch-02"][: n + 1],
        )
        for n in (0, 1)
    ]
    (note,) = [one for one in compared(*runs).notes if "not chosen alike" in one]
    assert "the best 1 on other (0); the best 2 on other (1)" in note
    assert "evaluate.select.take" in note
