from __future__ import annotations

import json
from pathlib import Path

import pytest

from anchored.errors import EvaluationError
from anchored.evaluate.questions import Questions


def questions(tmp_path: Path, *rows: object) -> Questions:
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return Questions(path)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("42", True),
        ("The answer is **42**.", True),
        ("First 6 x 7.\nSo: 42\n", True),
        ("forty-two", True),
        ("Forty-Two!", True),
        ("142", False),
        ("-42", False),
        ("0.42", False),
        ("\N{MINUS SIGN}42", False),
        ("1/42", False),
        ("It is 10:42.", False),
        ("Answer:42", True),
        (r"\boxed{42}", True),
        ("42 or 43", False),
        ("", False),
        ("</script>\x00", False),
    ],
)
def test_an_answer_is_right_if_it_ends_with_an_accepted_one(tmp_path: Path, answer: str, right: bool) -> None:
    benchmark = questions(tmp_path, {"prompt": "6 x 7?", "answer": [42, "forty-two"]})
    assert benchmark.grade(benchmark.items()[0], answer) == {"exact-match": float(right)}


@pytest.mark.parametrize(
    ("answer", "right"), [(".5", True), ("It is (.5).", True), ("5", False), ("0.5", False), ("-.5", False)]
)
def test_the_point_of_a_number_counts(tmp_path: Path, answer: str, right: bool) -> None:
    benchmark = questions(tmp_path, {"prompt": "1/2?", "answer": ".5"})
    assert benchmark.grade(benchmark.items()[0], answer) == {"exact-match": float(right)}


def test_a_null_id_or_category_is_one_left_out(tmp_path: Path) -> None:
    row = {"prompt": "x", "answer": "y", "id": None, "category": None}
    first, second = questions(tmp_path, row, row).items()
    assert (first.id, second.id, first.category) == ("0", "1", "other")


def test_the_version_is_the_content(tmp_path: Path) -> None:
    row = {"question": "6 x 7?", "answer": "42", "category": "sums", "id": "a"}
    first = questions(tmp_path, row)
    assert first.items()[0].category == "sums"
    assert questions(tmp_path, row).version == first.version
    assert questions(tmp_path, {**row, "answer": "43"}).version != first.version


@pytest.mark.parametrize(
    "row", [{"prompt": "x"}, {"prompt": "", "answer": "1"}, {"prompt": "x", "answer": []}, [1], "x"]
)
def test_a_bad_row_is_named(tmp_path: Path, row: object) -> None:
    with pytest.raises(EvaluationError, match="line 2"):
        questions(tmp_path, {"prompt": "x", "answer": "y"}, row)


def test_a_missing_or_empty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"no question file at .*gone\.jsonl"):
        Questions(tmp_path / "gone.jsonl")
    with pytest.raises(EvaluationError, match="holds no question"):
        questions(tmp_path)


@pytest.mark.parametrize("name", [".jsonl", "..jsonl", "...jsonl"])
def test_a_file_whose_name_says_nothing_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"prompt": "x", "answer": "y"}')
    with pytest.raises(EvaluationError, match="which says nothing; rename it"):
        Questions(tmp_path / name)
