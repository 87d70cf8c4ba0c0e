from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alpaca_world import N, baseline_rows, instruction, output_rows, save_world, write_json

from anchored.errors import EvaluationError
from anchored.evaluate import alpaca_files
from anchored.evaluate.alpaca_files import (
    BASELINE,
    DIFFICULTY,
    Annotation,
    in_order,
    read_annotations,
    read_data,
    read_outputs,
    write_annotations,
    write_outputs,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_world(tmp_path / "data")


def annotation(place: int = 0, preference: float | None = 1.25, **fields: Any) -> Annotation:
    row = {"instruction": instruction(place), "baseline": baseline_rows()[place]["output"], "answer": "a", **fields}
    return Annotation(**row, preference=preference, baseline_model="base", model="mine", annotator="judge")


def test_the_benchmark_is_read_and_what_is_not_official_is_said(folder: Path) -> None:
    data = read_data(folder)
    assert [one.text for one in data.instructions] == [instruction(place) for place in range(N)]
    assert (data.baseline, len(data.difficulty)) == ("base", N)
    assert data.gamed is not None
    assert len(data.gamed.preference) == 2 * N
    assert data.gamed.instruction is not None
    assert data.gamed.instruction.tolist() == [*range(N), *range(N)]
    sha = hashlib.sha256((folder / "df_gamed_small.csv").read_bytes()).hexdigest()[:12]
    assert data.regression == f"df_gamed_small.csv (sha256 {sha})"
    said = "; ".join(data.notes)
    assert f"{BASELINE} has {N} instructions of its own, not AlpacaEval's 805" in said
    assert "in place of the official df_gamed.csv" in said
    assert "is not the official instruction_difficulty.csv" in said


def test_official_files_are_known_by_their_hashes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "df_gamed_small.csv").rename(folder / "df_gamed.csv")
    for name in alpaca_files.SHA256:
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        monkeypatch.setitem(alpaca_files.SHA256, name, digest)
    rows = baseline_rows()
    for constant, key in (("INSTRUCTIONS_SHA256", "instruction"), ("OUTPUTS_SHA256", "output")):
        texts = "".join(row[key] + "\0" for row in rows)
        monkeypatch.setattr(alpaca_files, constant, hashlib.sha256(texts.encode()).hexdigest())
    data = read_data(folder)
    assert (data.regression, data.notes) == ("official", ())
    # the same content laid out in another way, and packed
    (folder / f"{BASELINE}.gz").write_bytes(gzip.compress(json.dumps(rows, indent=4).encode()))
    (folder / BASELINE).unlink()
    assert read_data(folder).notes == ()
    assert read_data(folder).version != data.version
    # other instructions beside official tables
    (folder / f"{BASELINE}.gz").unlink()
    write_json(folder / BASELINE, rows[:-1])
    with pytest.raises(EvaluationError, match=r"has 59 instructions which are not AlpacaEval's .* get .* from https"):
        read_data(folder)


def test_without_regression_data_the_notes_say_so(tmp_path: Path) -> None:
    data = read_data(save_world(tmp_path / "data", regression=False))
    assert (data.gamed, data.regression) == (None, "none")
    assert any("no df_gamed.csv" in note and "length_controlled_noreg" in note for note in data.notes)


def test_instructions_of_ones_own_need_no_tables_and_the_official_ones_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in folder.glob("*.csv"):
        file.unlink()
    data = read_data(folder)
    assert (data.difficulty, data.gamed, data.regression) == (None, None, "none")
    assert "has 60 instructions of its own" in data.notes[0]
    assert "no length-controlled rate, for" in data.notes[1]
    texts = "".join(row["instruction"] + "\0" for row in baseline_rows())
    monkeypatch.setattr(alpaca_files, "INSTRUCTIONS_SHA256", hashlib.sha256(texts.encode()).hexdigest())
    with pytest.raises(EvaluationError, match="holds neither df_gamed"):
        read_data(folder)


def test_difficulties_come_from_the_regression_data_where_they_are_alone(folder: Path) -> None:
    with_table = read_data(folder).difficulty
    (folder / DIFFICULTY).unlink()
    assert read_data(folder).difficulty == pytest.approx(with_table)


def test_regression_rows_without_a_preference_do_not_count(folder: Path) -> None:
    file = folder / "df_gamed_small.csv"
    lines = file.read_text().splitlines()
    lines[1] = lines[1].rpartition(",")[0] + ","
    file.write_text("\n".join(lines))
    gamed = read_data(folder).gamed
    assert gamed is not None
    assert len(gamed.preference) == 2 * N - 1


def change_cell(file: Path, cell: str) -> None:
    lines = file.read_text().splitlines()
    lines[1] = lines[1].rpartition(",")[0] + f",{cell}"
    file.write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / BASELINE).unlink(), "holds no alpaca_eval_gpt4_baseline.json; get it from https"),
        (lambda folder: (folder / BASELINE).write_text("[{"), "is not JSON"),
        (lambda folder: (folder / BASELINE).write_text("[]"), "is no list of rows, or an empty one"),
        (lambda folder: (folder / BASELINE).write_bytes(b"\xff\xfe[]"), "is not UTF-8"),
        (lambda folder: write_json(folder / BASELINE, [{"instruction": "a"}]), "row 0: has no text in 'output'"),
        (lambda folder: write_json(folder / BASELINE, baseline_rows()[:1] * 2), "has 1 instructions twice"),
        (
            lambda folder: write_json(folder / BASELINE, baseline_rows(59)),
            "difficulties of 60 instructions, not of 0 to",
        ),
        (lambda folder: shutil.copy(folder / "df_gamed_small.csv", folder / "df_gamed_b.csv"), "keep the one to use"),
        (lambda folder: change_cell(folder / "df_gamed_small.csv", "1.5"), "1 preferences are not from 0 to 1"),
        (lambda folder: change_cell(folder / DIFFICULTY, "hard"), "'instruction_difficulty' holds what is no number"),
        (lambda folder: (folder / DIFFICULTY).write_text("index,x\n0,1\n"), "no column 'instruction_difficulty'"),
        (lambda folder: (folder / DIFFICULTY).write_text(""), "no column 'instruction_difficulty'"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(folder: Path, harm: Callable[[Path], object], message: str) -> None:
    harm(folder)
    with pytest.raises(EvaluationError, match=message):
        read_data(folder)


def test_outputs_are_put_in_order_and_missing_ones_counted(folder: Path, tmp_path: Path) -> None:
    data = read_data(folder)
    rows = output_rows()
    outputs = read_outputs(write_json(tmp_path / "o.json", rows[:7:-1]), data)
    assert (outputs.generator, outputs.missing) == ("mine", 8)
    assert outputs.answers == (*[None] * 8, *(row["output"] for row in rows[8:]))
    write_outputs(tmp_path / "again.json", outputs, data)
    assert json.loads((tmp_path / "again.json").read_text()) == rows[8:]
    assert read_outputs(tmp_path / "again.json", data) == outputs


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [*output_rows(), {"instruction": "Who?", "output": "x"}],
            r"1 of its 61 instructions are not among the benchmark's 60 \(the first: 'Who\?'\)",
        ),
        ([*output_rows(), output_rows()[0]], "answers 1 instructions twice"),
        ([*output_rows()[1:], {**output_rows()[0], "generator": "yours"}], "of several generators"),
        ([{"instruction": "Question 0?", "output": None}], "row 0: has no text in 'output'"),
        ({"instruction": "Question 0?"}, "is no list of rows"),
    ],
)
def test_outputs_of_another_benchmark_are_refused(folder: Path, tmp_path: Path, rows: Any, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        read_outputs(write_json(tmp_path / "outputs.json", rows), read_data(folder))


def test_annotations_are_written_as_they_are_read(tmp_path: Path) -> None:
    rows = [
        annotation(0, raw={"text": "M"}, dataset="small"),
        annotation(1, None),
        annotation(2, 2.0, answer='</script>\x00 "\ud83d" é'),
    ]
    write_annotations(tmp_path / "annotations.json", rows)
    assert read_annotations(tmp_path / "annotations.json") == rows
    first = json.loads((tmp_path / "annotations.json").read_text())[0]
    names = "instruction output_1 generator_1 dataset output_2 generator_2 annotator preference raw_completion"
    assert list(first) == names.split()


@pytest.mark.parametrize(("written", "read"), [("NaN", None), ("null", None), ("0", 1.5), ("0.0", 1.5), ("2", 2.0)])
def test_preferences_as_files_have_them(tmp_path: Path, written: str, read: float | None) -> None:
    file = tmp_path / "a.json"
    file.write_text(f'[{{"instruction": "a", "output_1": "b", "output_2": "c", "preference": {written}}}]')
    assert read_annotations(file)[0].preference == read


@pytest.mark.parametrize("written", ["3", "0.5", "-1"])
def test_what_is_no_preference_is_named(tmp_path: Path, written: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(f'[{{"instruction": "a", "output_1": "b", "output_2": "c", "preference": {written}}}]')
    with pytest.raises(EvaluationError, match=f"row 0: the preference {re.escape(written)} is not from 1 to 2"):
        read_annotations(file)


def test_annotations_are_put_in_order(folder: Path) -> None:
    data = read_data(folder)
    rows = [annotation(2), annotation(0)]
    assert in_order(rows, data) == [rows[1], None, rows[0], *[None] * (N - 3)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([annotation(instruction="Who?")], r"'Who\?' is of none of the benchmark's 60 instructions"),
        ([annotation(3), annotation(3)], r"'Question 3\?' is annotated twice"),
        ([annotation(baseline="another")], "is judged against another answer than that of base"),
    ],
)
def test_annotations_of_something_else_are_refused(folder: Path, rows: list[Annotation], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        in_order(rows, read_data(folder))


def test_difficulties_belong_to_their_index(folder: Path) -> None:
    lines = (folder / DIFFICULTY).read_text().splitlines()
    before = read_data(folder).difficulty
    (folder / DIFFICULTY).write_text("\n".join([lines[0], *reversed(lines[1:])]))
    assert np.array_equal(read_data(folder).difficulty, before)
