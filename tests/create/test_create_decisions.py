"""The stage honours what people decided: after the filters, on redone rows, without a request."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet
import pytest
from test_create_stage import (
    REASONED,
    Heard,
    Scripted,
    answer_of,
    by_prompt,
    make,
    prompts,
    revise,
    settings,
    student_of,
)

from anchored.datasets_io import read_rows
from anchored.decisions import DecisionFile, decide
from anchored.errors import DataError
from anchored.llm.chat import Request
from anchored.records import Outcome, Pair
from anchored.runs import Run


def leak_about_b(request: Request) -> str:
    if " b " in student_of(request):
        return REASONED + "In this corrected solution, b is known."
    return revise(request)


def made(folder: Path) -> dict[str, Pair]:
    run = Run(folder)
    return by_prompt([row for path in (run.pairs, run.held_out, run.refused) for row in read_rows(path)])


def make_again(folder: Path, **more: object) -> tuple[dict[str, Pair], Heard]:
    """Redo the stage, with chats that must not be asked."""
    Run(folder).redo("create")
    policy, teacher, heard = Scripted("policy", answer_of), Scripted("teacher", leak_about_b), Heard()
    make(folder, prompts("a", "b", "c", held_out=["h"]), settings(**more), policy, teacher, heard)
    assert policy.requests == teacher.requests == []
    return made(folder), heard


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = prompts("a", "b", "c", held_out=["h"])
    make(tmp_path, rows, settings(), Scripted("policy", answer_of), Scripted("teacher", leak_about_b))
    return tmp_path


def test_kept_dropped_and_edited_rows_are_so_after_a_redo_and_back_again_when_undone(folder: Path) -> None:
    before = made(folder)
    assert {name: str(row.outcome) for name, row in before.items()} == {"a": "ok", "b": "leak", "c": "ok", "h": "ok"}
    file = DecisionFile(Run(folder).decisions)
    file.append(decide(before["a"], "drop", note="dull"))
    file.append(decide(before["b"], "keep"))
    file.append(decide(before["c"], "edit", {"chosen": "The answer to c is known, we looked twice."}))
    file.append(decide(before["h"], "drop"))

    after, heard = make_again(folder)
    assert {name: str(row.outcome) for name, row in after.items()} == {
        "a": "dropped",
        "b": "ok",
        "c": "ok",
        "h": "dropped",
    }
    assert after["a"].detail == "dropped by a person (dull)"
    assert after["b"].detail.startswith("kept by a person, was: leak (")
    assert (after["c"].chosen.text, after["c"].chosen.model) == (
        "The answer to c is known, we looked twice.",
        "teacher-1+edited",
    )
    assert any("4 decisions (1 keep, 2 drop, 1 edit)" in note for note in heard.notes)
    table = pyarrow.parquet.read_table(Run(folder).pairs).to_pylist()
    edited = next(row for row in table if row["id"] == "c")
    assert edited["length_ratio"] == len(after["c"].chosen.text) / len(after["c"].rejected.text)

    for name in ("a", "b", "c", "h"):
        file.append(decide(before[name], "undo"))
    assert make_again(folder)[0] == before


def test_decisions_may_stand_in_another_file(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "mine.jsonl"
    DecisionFile(elsewhere).append(decide(made(folder)["a"], "drop"))
    assert make_again(folder)[0]["a"].outcome is Outcome.OK
    assert make_again(folder, decisions=str(elsewhere))[0]["a"].outcome is Outcome.DROPPED


def test_a_file_of_decisions_that_is_not_there_is_an_error_before_anything_is_asked(tmp_path: Path) -> None:
    policy = Scripted("policy", answer_of)
    with pytest.raises(DataError, match=r"create\.decisions: .*gone\.jsonl: no such file"):
        make(
            tmp_path,
            prompts("a"),
            settings(decisions=str(tmp_path / "gone.jsonl")),
            policy,
            Scripted("teacher", revise),
        )
    assert policy.requests == []


def test_a_file_with_unreadable_lines_is_told_of_and_used(folder: Path) -> None:
    path = Run(folder).decisions
    DecisionFile(path).append(decide(made(folder)["a"], "drop"))
    with open(path, "a") as handle:
        handle.write('{"id": "c", "decis')
    after, heard = make_again(folder)
    assert after["a"].outcome is Outcome.DROPPED
    assert after["c"].outcome is Outcome.OK
    assert any("1 unreadable left out (line 2)" in note for note in heard.notes)


def test_a_pair_that_was_made_otherwise_is_not_the_one_that_was_dropped(folder: Path) -> None:
    DecisionFile(Run(folder).decisions).append(decide(made(folder)["a"], "drop"))

    def reword(request: Request) -> str:
        return revise(request).replace("we looked", "we asked")

    other = Scripted("another teacher", reword)
    make(folder, prompts("a", "b"), settings(), Scripted("policy", answer_of), other)
    assert made(folder)["a"].outcome is Outcome.OK
